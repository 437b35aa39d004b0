"use strict";
(() => {
  const storage = document.getElementById("rating").dataset.storage;
  const status = document.getElementById("status");
  const sets = [...document.querySelectorAll("details.set")];
  const read = () => {
    try { return JSON.parse(localStorage.getItem(storage)) || {}; } catch { return {}; }
  };
  const ratings = read();

  const isDone = (set) => [...set.querySelectorAll(".scale")].every((scale) => scale.querySelector("input:checked"));
  const refresh = () => {
    let done = 0;
    sets.forEach((set) => {
      const whole = isDone(set);
      set.classList.toggle("done", whole);
      done += whole ? 1 : 0;
    });
    status.textContent = done + " of " + sets.length + " prompts rated";
  };
  document.querySelectorAll(".scale input").forEach((input) => {
    input.checked = ratings[input.name] === Number(input.value);
    input.addEventListener("change", () => {
      ratings[input.name] = Number(input.value);
      try { localStorage.setItem(storage, JSON.stringify(ratings)); } catch { status.textContent = "This browser cannot store the ratings."; }
      refresh();
    });
  });
  document.getElementById("save").addEventListener("click", () => {
    const lines = Object.entries(ratings).map(([answer, score]) => JSON.stringify({ answer, score }) + "\n");
    const link = document.createElement("a");
    const rater = Math.random().toString(16).slice(2, 8);
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
    link.download = "ratings_" + rater + ".jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  refresh();
})();
