"""linear_cross_entropy in Triton's interpreter against float64: loss, each token's, both gradients."""

import pytest
import torch
from harness import DEVICE, DTYPES, check

import kernels
from kernels import cases
from kernels.fused import linear_cross_entropy as fused
from kernels.fused import measured

inputs_of = cases.linear_cross_entropy_inputs


SHAPES = [
    (1, 1, 8, 1),
    (2, 5, 40, 7),
    (1, 63, 64, 130),
    (3, 50, 33, 1100),
    (3, 50, 33, 290),
    (2, 3, 380, 257),
    (1, 70, 512, 100),
]
# "recompute" holds rows of 1 KiB: of float32 up to 256 features. Its tiles are small, 1,100 words take a minute. A
# single word is a test of its own: exactly 0 in theory, here the difference of two sums of products
CASES = [
    (shape, logits, dtype)
    for shape in SHAPES
    for logits in fused.LOGITS
    for dtype in DTYPES
    if logits == "chunks" or (shape[2] * dtype.itemsize <= fused.RECOMPUTE_ROW and 1 < shape[3] < 1000)
]


@pytest.mark.parametrize(("shape", "logits", "dtype"), CASES, ids=str)
def test_shapes(shape, logits, dtype):
    settings = {"scale": shape[2] ** -0.5, "logits": logits}
    check("linear_cross_entropy", inputs_of(*shape), settings, dtype)


def test_a_single_word_has_no_loss_and_no_gradient():
    inputs = {n: x.to(DEVICE, torch.float32 if n != "labels" else None) for n, x in inputs_of(1, 70, 64, 1).items()}
    leaves = inputs | {n: inputs[n].requires_grad_() for n in ("h", "weight")}
    loss = kernels.linear_cross_entropy(**leaves, scale=0.125, logits="recompute", impl="triton")
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert all(leaves[n].grad.abs().max() < 1e-6 for n in ("h", "weight"))


def test_the_form_of_backward_follows_from_width_and_type(monkeypatch):
    """The stated rule, and no other: 16 bits and up to 512 features in registers, the rest in chunks."""
    forms = []
    monkeypatch.setattr(fused, "_forward_op", lambda *arguments: forms.append(arguments[5]) or (None,) * 5)
    for dtype, width in ((torch.float16, 512), (torch.bfloat16, 8), (torch.float16, 520), (torch.float32, 8)):
        fused.linear_cross_entropy(
            torch.empty(1, 1, width, dtype=dtype), torch.empty(2, width), None, scale=1.0, ignore_index=-100
        )
    assert forms == ["recompute", "recompute", "chunks", "chunks"]
    with pytest.raises(ValueError, match="at most 1024 bytes, got 'recompute' for 1040"):
        fused.linear_cross_entropy(
            torch.empty(1, 1, 520, dtype=torch.float16), torch.empty(2, 520), None, scale=1.0, ignore_index=-100,
            logits="recompute",
        )  # fmt: skip
    with pytest.raises(ValueError, match="got 'all'"):
        kernels.linear_cross_entropy(**_on_device(), logits="all", impl="triton")


@pytest.mark.parametrize("splits", [1, 4])
def test_splits_of_the_vocabulary(monkeypatch, splits):
    """More than one tile a split, and a last split that is shorter."""
    monkeypatch.setattr(fused, "RECOMPUTE_SPLITS", splits)
    check("linear_cross_entropy", inputs_of(2, 40, 24, 200), {"scale": 0.3, "logits": "recompute"})


def test_rounding_of_the_gradient_in_bfloat16():
    """G in bf16 against float64, by plain torch: the interpreter's bf16 is wrong, so the formula stands in for the
    kernel, whose steps it repeats. No worse than the same-dtype formula, which rounds the logits as well."""
    inputs = inputs_of(2, 40, 64, 300)
    h, weight, labels = inputs["h"].flatten(0, 1), inputs["weight"], inputs["labels"].flatten()
    low_h, low_weight = h.bfloat16(), weight.bfloat16()
    exact_h, exact_weight = low_h.double(), low_weight.double()
    valid = (labels != -100).double()[:, None]
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), 300).double()

    def gradient(s, rounded):
        return rounded((torch.softmax(s, 1) - onehot.to(s.dtype)) * valid.to(s.dtype))

    exact = gradient(exact_h @ exact_weight.T, lambda g: g)
    wide = (low_h.float() @ low_weight.float().T).float()
    kernel = gradient(wide, lambda g: g.bfloat16().float())
    formula = gradient((low_h @ low_weight.T), lambda g: g).float()
    for product, operand in ((lambda g, x: g @ x, low_weight), (lambda g, x: g.T @ x, low_h)):
        want = product(exact, operand.double())
        ours, theirs = ((product(g, operand.float()).bfloat16().double() - want).abs().max() for g in (kernel, formula))
        assert 0 < ours <= 2 * theirs + 1e-5


def test_a_wider_row_than_fits_goes_in_chunks():
    check("linear_cross_entropy", inputs_of(1, 5, 520, 40), {"scale": 0.04}, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_of_the_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1)
    check("linear_cross_entropy", inputs_of(2, 9, 24, 300), {"scale": 0.3, "logits": "chunks"}, dtype)


@pytest.mark.parametrize("n", [32, 256])
def test_tiles_of_another_width(monkeypatch, n):
    """G has room for whole tiles, whichever the table names; a write beyond it would be seen."""
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1)
    tile = {"m": 32, "n": n, "k": 16, "warps": 4, "stages": 2}
    with measured.trying("linear_cross_entropy.dlogits.32", tile):
        check("linear_cross_entropy", inputs_of(2, 9, 24, 300), {"scale": 0.3, "logits": "chunks"})


def test_chunks_are_even_and_bounded():
    for tokens in (206, 13_184, 52_736):
        for vocabulary in (1000, 30_000, 32_128):
            columns = fused.chunk_columns(tokens, vocabulary, 2)
            assert columns % 128 == 0
            assert columns * tokens * 2 <= fused.CHUNK_BYTES
            # no chunk is a remnant
            last = vocabulary - (-(-vocabulary // columns) - 1) * columns
            assert last >= 0.5 * min(columns, vocabulary)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "vocabulary"), [(512, 3000), (448, 1500), (380, 2049), (1024, 1000), (1, 5)])
def test_larger(width, vocabulary, dtype):
    # 16 bits up to 512 features recompute, the others take chunks
    check("linear_cross_entropy", inputs_of(3, 87, width, vocabulary), {"scale": width**-0.5}, dtype)


@pytest.mark.parametrize("logits", fused.LOGITS)
def test_all_labels_ignored(logits):
    inputs = inputs_of(2, 3, 16, 9)
    inputs["labels"].fill_(-100)
    result = check("linear_cross_entropy", inputs, {"scale": 1.0, "logits": logits})
    assert result.outputs["loss"].item() == 0.0


@pytest.mark.parametrize("logits", fused.LOGITS)
def test_another_ignored_index(logits):
    inputs = inputs_of(2, 9, 16, 9, ignored=0.0)
    check("linear_cross_entropy", inputs, {"scale": 1.0, "ignore_index": 4, "logits": logits})


@pytest.mark.parametrize("logits", fused.LOGITS)
def test_large_logits(logits):
    """Logits of some hundreds: the running maximum keeps the sums finite."""
    inputs = inputs_of(2, 9, 16, 300)
    check("linear_cross_entropy", inputs, {"scale": 30.0, "logits": logits})


CASE = (inputs_of(2, 6, 24, 40, ignored=0.3, seed=1), {"scale": 0.3})


def _on_device(dtype=torch.float32):
    return {n: x.to(DEVICE, dtype if x.dtype.is_floating_point else None) for n, x in CASE[0].items()}


@pytest.mark.parametrize("logits", fused.LOGITS)
def test_no_logits_are_held(monkeypatch, logits):
    """Neither what is saved nor any tensor of the two passes has tokens x vocabulary elements."""
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1)
    inputs = {n: x.to(DEVICE, torch.float32 if n != "labels" else None) for n, x in inputs_of(2, 40, 8, 400).items()}
    leaves = inputs | {n: inputs[n].requires_grad_() for n in ("h", "weight")}
    sizes, saved = [], []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x), Sizes():
        kernels.linear_cross_entropy(**leaves, scale=0.3, logits=logits, impl="triton").backward()
    # recomputed: nothing with an element for a token and a word, not even of a chunk
    assert max(sizes) < (80 * 400 if logits == "chunks" else 400 * 8 + 1)
    # h, E, labels, lse, 1 / count; recomputed: dh too
    assert sum(saved) < (2 if logits == "recompute" else 1) * 80 * 8 + 400 * 8 + 3 * 80 + 2
