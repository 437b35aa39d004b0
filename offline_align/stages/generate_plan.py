"""The output of `generate dry_run=true`: policy, ranks, engine, condition and launch command."""

import sys

from rich.table import Table

from offline_align.config.compose import world_size
from offline_align.config.runs import GenerateRun
from offline_align.convert.source import ModelSource
from offline_align.estimate.sizes import model_sizes
from offline_align.launch import torchrun_command
from offline_align.stages.output import show


def print_generate_dry_run(config: GenerateRun, source: ModelSource, condition: str, engine: str) -> None:
    """Print the dry run of `generate`, without loading or writing anything."""
    settings = config.generate
    world = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    sizes = model_sizes(source.model, source.model.vocab_size or 0)
    sampling = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    words = [word for word in sys.argv[2:] if not word.startswith(("dry_run=", "launcher."))]
    rows = {
        "policy": f"{config.init.from_}, {sizes.parameters:,} parameters, method {source.description.method or 'none'}",
        "ranks": f"{world}, each with the whole policy and a share of the prompts",
        "engine": f"{engine}, {settings.batch_size} prompts at once",
        "answers": f"{settings.n} to each prompt, at most {settings.max_new_tokens} tokens, {sampling}",
        "condition": condition or "none",
        "launch": " ".join(torchrun_command(config.launcher, "generate", words)),
    }
    table = Table(title=f"generate: {config.run.dir}", title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    show(table)
