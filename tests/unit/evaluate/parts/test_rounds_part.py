"""The numbers of each round: rewards on the first round's scale, gains, KL, order of the judge, support."""

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.divergence import Divergence
from offline_align.evaluate.parts.rounds import right_orders, rounds_section
from offline_align.evaluate.results import Compared, Judgement
from offline_align.evaluate.sections import Section
from offline_align.evaluate.statistics import Floats
from offline_align.lineage.manifest import describe_parent
from tests.unit.evaluate.conftest import Rounds

SETTINGS = EvaluateSection(bootstrap_samples=100)
# Raw labels of the first round: mean 10, standard deviation 2, highest 12.
LABELS = (8.0, 12.0, 8.0, 12.0)


def section(
    rounds: Rounds,
    scores: Floats,
    quality: Floats | None = None,
    divergence: Divergence | None = None,
    judge: str | None = "ours",
) -> Section | None:
    """Return the section for three rounds with these scores [3 prompts, samples, 3 rounds]."""
    sft = rounds.first()
    one = rounds.next(sft, "dpo_1", LABELS)
    two = rounds.next(one, "dpo_2", [100.0, 200.0])
    files = [rounds.answer(p, f"round_{k}", samples=scores.shape[1]) for k, p in enumerate((sft, one, two))]
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    content = describe_parent(rounds.reward).content_sha256 if judge == "ours" else judge
    compared = Compared(comparison, Judgement("rm", scores, {}), quality)
    return rounds_section(compared, SETTINGS, 0, content, divergence)


def of_rounds(*values: float, samples: int = 2) -> Floats:
    return np.tile(np.array(values), (3, samples, 1))


def test_rewards_are_on_the_scale_of_the_first_labels(rounds: Rounds) -> None:
    found = section(rounds, of_rounds(10.0, 12.0, 13.0))
    assert found is not None
    about = found.content["series"]["dpo"]
    assert (about["unit"], about["first_labels"], about["highest_label"]) == ("normalised reward", "label_dpo_1", 1.0)
    assert [one["reward"]["mean"] for one in about["rounds"].values()] == [0.0, 1.0, 1.5]
    assert [one["beyond"]["mean"] for one in about["rounds"].values()] == [0.0, 0.0, 1.0]
    assert about["rounds"]["2"]["reward_gain"]["mean"] == 0.5
    assert "reward_gain" not in about["rounds"]["0"]
    assert [one["method"] for one in about["rounds"].values()] == ["sft", "round_1", "round_2"]
    assert "dpo: in round 2, 100% of the answers score above every labelled answer of the first round" in " ".join(
        found.findings
    )


def test_another_judge_keeps_its_own_unit(rounds: Rounds) -> None:
    found = section(rounds, of_rounds(10.0, 12.0, 15.0), judge=None)
    assert found is not None
    about = found.content["series"]["dpo"]
    assert about["unit"] == "judge's score"
    assert about["rounds"]["2"]["reward"]["mean"] == 15.0
    assert "beyond" not in about["rounds"]["2"]


def test_a_reward_that_rises_without_quality_is_over_optimisation(rounds: Rounds) -> None:
    found = section(rounds, of_rounds(10.0, 11.0, 12.0), of_rounds(5.0, 8.0, 6.0))
    assert found is not None
    assert found.content["series"]["dpo"]["rounds"]["2"]["true_quality_gain"]["mean"] == -2.0
    doubts = found.findings[1:]
    assert doubts == [
        "dpo: round 2 has a higher reward than round 1 but a lower true quality (-2.00 [-2.00, -2.00]): the policy "
        "exploits errors of the reward model."
    ]
    assert found.findings[0].startswith(
        "dpo, from round 0 to 2: normalised reward 0.00 to 1.00, true quality 5.00 to 6.00, length"
    )


def test_rounds_without_a_gain_are_named(rounds: Rounds) -> None:
    found = section(rounds, of_rounds(10.0, 12.0, 11.0))
    assert found is not None
    assert found.findings[1:] == ["dpo: round 2 lowers the reward (-0.50 [-0.50, -0.50] over round 1)."]


def test_the_divergence_is_that_from_the_first_policy(rounds: Rounds) -> None:
    nats, tokens = of_rounds(0.0, 3.0, 7.0), np.full((3, 2, 3), 10.0)
    found = section(rounds, of_rounds(10.0, 11.0, 12.0), divergence=Divergence(nats, tokens, (True, True, False)))
    assert found is not None
    described = found.content["series"]["dpo"]["rounds"]
    assert [one["kl"]["mean"] for one in described.values()] == [0.0, 3.0, 7.0]
    assert "KL from the first policy 7.00 nats per answer" in found.findings[0]
    assert found.findings[-1].startswith("dpo: not all answers were sampled at temperature 1")


def test_a_divergence_from_another_policy_is_not_shown(rounds: Rounds) -> None:
    sft = rounds.first()
    one = rounds.next(sft, "dpo_1", LABELS)
    files = [rounds.answer(one, "b"), rounds.answer(sft, "a")]
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    compared = Compared(comparison, Judgement("rm", np.ones((3, 1, 2)), {}))
    divergence = Divergence(np.ones((3, 1, 2)), np.ones((3, 1, 2)), (True, True))
    kept = {}
    for baseline in ("sft", "dpo"):
        settings = EvaluateSection(bootstrap_samples=10, baseline=baseline)
        found = rounds_section(compared, settings, 0, None, divergence)
        assert found is not None
        kept[baseline] = "kl" in found.content["series"]["dpo"]["rounds"]["1"]
    assert kept == {"sft": True, "dpo": False}


def test_pairs_of_samples_show_whether_the_judge_orders_them_right() -> None:
    # Three samples: of the pairs with different quality, one is right, one wrong; a tie of rewards counts half.
    rewards, quality = np.array([[1.0, 2.0, 0.0], [1.0, 1.0, 5.0]]), np.array([[1.0, 2.0, 2.0], [3.0, 4.0, 4.0]])
    np.testing.assert_array_equal(right_orders(rewards, quality), [[1.0, 2.0], [1.5, 2.0]])


def test_the_order_is_unknown_without_different_qualities(rounds: Rounds) -> None:
    quality = of_rounds(5.0, 5.0, 5.0)
    quality[:, 1, 1] = 7.0
    scores = of_rounds(10.0, 11.0, 12.0)
    scores[:, 1, 1] = 10.0
    found = section(rounds, scores, quality)
    assert found is not None
    described = found.content["series"]["dpo"]["rounds"]
    assert "order_right" not in described["0"]
    assert described["1"]["order_right"]["mean"] == 0.0


def test_prompts_without_a_score_are_left_out(rounds: Rounds) -> None:
    scores = of_rounds(10.0, 12.0, 14.0)
    scores[0, 0, 1] = np.nan
    scores[0, 1, 2] = 1e9
    found = section(rounds, scores)
    assert found is not None
    assert found.content["series"]["dpo"]["rounds"]["2"]["reward"]["mean"] == pytest.approx(2.0)


def test_every_known_quantity_has_a_panel_and_a_column(rounds: Rounds) -> None:
    quality = of_rounds(5.0, 6.0, 7.0)
    quality[:, 1] += 1
    found = section(rounds, of_rounds(10.0, 11.0, 12.0), quality)
    assert found is not None
    (table,) = found.tables
    assert [row[0] for row in table.rows] == ["0", "1", "2"]
    assert {"normalised reward", "true quality", "order right", "words", "beyond"} <= set(table.header)
    assert "KL" not in table.header
    svg = found.drawings[0].picture.svg()
    assert "true quality" in svg and "KL from" not in svg
