"""Steps that train on two kinds of rows: the policy's own answers, and texts beside them."""

from dataclasses import replace

from offline_align.data.loader import StepData


def with_texts(answers: StepData, texts: StepData) -> StepData:
    """Return the step of `answers` with the micro-batches of `texts` added to those of each rank.

    The loss of a step is divided by the targets of the answers alone, whatever stands beside them. So
    the weights of the texts' targets, 1 each, are scaled by the ratio of both numbers of targets, and
    their term becomes a mean over the targets of the texts.
    """
    scale = answers.num_read / max(texts.num_read, 1)
    scaled = [replace(batch, target_weights=batch.target_weights * scale) for batch in texts.micro_batches]
    return StepData(
        micro_batches=answers.micro_batches + scaled,
        num_rows=answers.num_rows,
        num_tokens=answers.num_tokens + texts.num_tokens,
        num_padding=answers.num_padding + texts.num_padding,
        squared_lengths=answers.squared_lengths + texts.squared_lengths,
        num_read=answers.num_read + texts.num_read,
    )
