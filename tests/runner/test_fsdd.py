"""The speech workloads: utterances, features, word error rate and padding."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import jiwer
import numpy as np
import pytest
import torch

from runner.workloads import fsdd, load_workload
from runner.workloads.base import rows


@pytest.fixture(scope="module", params=["fsdd_conformer", "fsdd_lstm"])
def speech(request):
    return load_workload(request.param)


@pytest.mark.slow
def test_splits_share_no_utterance(speech):
    """Splits share no frame. Train has its 220 utterances of each digit four times, validation its 50 and test its 30 twice."""
    frames = {}
    for name, examples in speech._splits.items():
        values, paddings = examples["inputs"]
        frames[name] = {tuple(frame) for frame in values[paddings == 0].tolist()}
        words = [word for symbols in fsdd.sequences(*examples["targets"]) for word in fsdd.read(symbols)]
        count = {"train": 880, "validation": 100, "test": 60}
        assert name == "eval_train" or all(words.count(word) == count[name] for word in fsdd.WORDS)
    assert not frames["train"] & frames["validation"]
    assert not (frames["train"] | frames["validation"]) & frames["test"]
    everything = torch.cat(fsdd.load_utterances()[0])
    assert len(frames["train"] | frames["validation"] | frames["test"]) == len(everything.unique(dim=0))


def test_features_are_normalized_by_the_training_split(speech):
    values, paddings = speech._splits["train"]["inputs"]
    std, mean = torch.std_mean(values[paddings == 0], dim=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("decoded", "reference", "errors"),
    [
        ("one two", "one two", 0),
        ("", "one two", 2),
        ("one two", "", 2),
        ("one three", "one two", 1),
        ("two", "one two three", 2),
        ("nine one two", "one two three", 2),
        ("onetwo", "one two", 2),
    ],
)
def test_edit_distance_counts_word_errors(decoded, reference, errors):
    assert fsdd.edit_distance(decoded.split(), reference.split()) == errors


def random_sentences(count, seed):
    """Return sentences of 0 to 6 words out of three, so that words repeat and sentences share parts."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(["one", "two", "three"], size=size)) for size in draw.integers(0, 7, size=count)]


def test_edit_distance_is_jiwers():
    """Also for empty sentences, which are among the random ones."""
    pairs = list(zip(random_sentences(300, seed=0), random_sentences(300, seed=1)))
    assert {("", True), ("", False)} <= {(decoded, bool(reference)) for decoded, reference in pairs}
    for decoded, reference in pairs:
        found = jiwer.process_words(reference, decoded)
        errors = found.substitutions + found.deletions + found.insertions
        assert fsdd.edit_distance(decoded.split(), reference.split()) == errors


def test_the_word_error_rate_is_jiwers(speech):
    """Over a batch: total errors over total words."""
    decoded, references = random_sentences(30, seed=2), random_sentences(30, seed=3)
    logits, _ = sentence_logits(*map(spelled, decoded))
    _, targets = sentence_logits(*references)
    sums = {name: value.item() for name, value in speech.metric_sums(logits, targets).items()}
    assert speech.metrics(sums, 30)["wer"] == pytest.approx(jiwer.wer(references, decoded))


def spelled(sentence):
    """Return the symbols of a sentence with a blank after each, so that equal letters in a row stay apart."""
    return "".join(letter + "_" for letter in sentence)


def sentence_logits(*sentences):
    """Return logits whose most likely symbols spell the sentences, with paddings; and the symbols, with paddings."""
    symbols, paddings = fsdd.padded([torch.tensor([fsdd.SYMBOLS.index(c) for c in sentence]) for sentence in sentences])
    symbols = symbols + (paddings * fsdd.SYMBOLS.index("x")).long()  # padding must be ignored
    return (torch.nn.functional.one_hot(symbols, len(fsdd.SYMBOLS)).float(), paddings), (symbols, paddings)


def test_wer_is_total_errors_over_total_words(speech):
    logits, _ = sentence_logits("__oonne__ _ttwwo_", "thre_e", "threee ssix")  # "one two", "three", "thre six"
    _, targets = sentence_logits("one two", "three", "three four six")
    assert fsdd.greedy_words(*logits) == [["one", "two"], ["three"], ["thre", "six"]]
    sums = {name: value.item() for name, value in speech.metric_sums(logits, targets).items()}
    assert (sums["errors"], sums["words"]) == (2, 6)
    assert speech.metrics(sums, 3) == {"wer": 2 / 6, "loss": sums["loss"] / 3}


def test_padding_changes_neither_logits_nor_loss(speech):
    """Its values and the other examples of a batch change nothing either."""
    model, _ = speech.init_model_fn([0, 0])
    batch = rows(speech._splits["train"], slice(8))
    (features, paddings), (labels, label_paddings) = batch["inputs"], batch["targets"]
    with torch.no_grad():
        for _ in range(3):
            model((features, paddings))  # gives batch norm its statistics
        logits = model.eval()((features, paddings))
        losses = speech.loss_fn(batch["targets"], logits)["per_example"]
        assert (losses > 0).all()
        noisy = features + torch.randn_like(features) * paddings[..., None]
        padded = model((noisy, paddings))
        torch.testing.assert_close(padded[0][padded[1] == 0], logits[0][logits[1] == 0])
        longer = torch.nn.functional.pad(labels, (0, 5), value=3), torch.nn.functional.pad(label_paddings, (0, 5), value=1.0)
        torch.testing.assert_close(speech.loss_fn(longer, padded)["per_example"], losses)
        for i, length in enumerate(fsdd.lengths(paddings).tolist()):
            unpadded = model((features[i : i + 1, :length], paddings[i : i + 1, :length]))
            assert unpadded[1].sum() == 0
            size = unpadded[0].shape[1]
            assert size == (length + 1) // 2 == fsdd.lengths(logits[1])[i]
            torch.testing.assert_close(unpadded[0][0], logits[0][i, :size], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(speech.loss_fn(rows(batch, slice(i, i + 1))["targets"], unpadded)["summed"], losses[i])


def test_masks_hide_a_band_and_a_few_frames():
    draw = np.random.default_rng(0)
    hidden = fsdd.masked(torch.ones(200, 64, fsdd.COEFFICIENTS), draw) == 0
    bands, frames = hidden.all(dim=1), hidden.all(dim=2)
    assert torch.equal(hidden, bands[:, None, :] | frames[:, :, None])
    assert 0 < bands.sum(dim=1).double().mean() < fsdd.BAND
    assert bands.sum(dim=1).max() == fsdd.BAND
    assert 4 < frames.sum(dim=1).double().mean() <= 8  # at most 4 spans of 2 frames on average
