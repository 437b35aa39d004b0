"use strict";
(() => {
  const search = document.getElementById("search");
  const group = document.getElementById("group");
  const status = document.getElementById("status");
  const prompts = [...document.querySelectorAll("details.set")];
  const texts = prompts.map((prompt) => prompt.textContent.toLowerCase());

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = group ? group.value : "";
    let shown = 0;
    prompts.forEach((prompt, index) => {
      const fits = words.every((word) => texts[index].includes(word));
      prompt.hidden = !fits || (wanted !== "" && prompt.dataset.group !== wanted);
      shown += prompt.hidden ? 0 : 1;
    });
    status.textContent = shown + " of " + prompts.length + " prompts";
  };
  const showMethod = (box) => {
    document.querySelectorAll(".answer").forEach((answer) => {
      if (answer.dataset.method === box.value) answer.hidden = !box.checked;
    });
  };
  search.addEventListener("input", filter);
  if (group) group.addEventListener("change", filter);
  document.querySelectorAll("input[name=method]").forEach((box) => {
    box.addEventListener("change", () => showMethod(box));
  });
  document.getElementById("toggle").addEventListener("click", (event) => {
    const open = event.currentTarget.getAttribute("aria-pressed") !== "true";
    event.currentTarget.setAttribute("aria-pressed", String(open));
    event.currentTarget.textContent = open ? "Close all" : "Open all";
    prompts.forEach((prompt) => { prompt.open = open; });
  });
  const targets = document.getElementById("targets");
  if (targets) targets.addEventListener("click", () => {
    const only = targets.getAttribute("aria-pressed") !== "true";
    targets.setAttribute("aria-pressed", String(only));
    document.querySelectorAll("input[name=method]").forEach((box) => {
      box.checked = !only || "target" in box.dataset;
      showMethod(box);
    });
  });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      search.focus();
    }
  });
  document.querySelectorAll(".needs-script").forEach((part) => { part.hidden = false; });
  filter();
})();
