"""The decoders against an independent float64 computation, and what they must never look at."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmtrain.config import ModelConfig
from mmtrain.models import Decoder, build_model, count_parameters

VOCABULARY, POSITIONS, GRID = 90, 40, 3
LLAMA = {"family": "llama", "ffn_width": 40, "rope_base": 30.0}
CHAMELEON = LLAMA | {"family": "chameleon", "picture_grid": GRID}
GROUPED = {"width": 32, "heads": 4, "kv_heads": 2}
VARIANTS = {
    "cm3leon": {},
    "cm3leon grouped": GROUPED,
    "llama": LLAMA,
    "llama grouped": LLAMA | GROUPED,
    "chameleon": CHAMELEON,
    "chameleon grouped": CHAMELEON | GROUPED,
    "chameleon grouped, norms after": CHAMELEON | GROUPED | {"norm_after": True},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def small(variant: str = "cm3leon", **changes: object) -> ModelConfig:
    settings = {"layers": 3, "width": 24, "heads": 3, "init_std": 0.2, "position_init_std": 0.2}
    return ModelConfig(**(settings | {"zero_init_outputs": False} | VARIANTS[variant] | changes))


def build(config: ModelConfig, seed: int = 0) -> Decoder:
    model = build_model(config, VOCABULARY, POSITIONS)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # gains and biases of norms start at 1 and 0, which hides mistakes
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def packed_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows: documents of 9, 1 and 14 tokens and 4 of padding; documents of 15 and 13."""
    rng = np.random.default_rng(seed)
    document = np.array([[0] * 9 + [1] + [2] * 14 + [-1] * 4, [0] * 15 + [1] * 13])
    position = np.array([[*range(9), 0, *range(14), 0, 0, 0, 0], [*range(15), *range(13)]])
    weight = rng.choice([0.0, 0.5, 1.0, 2.0], document.shape) * (document >= 0)
    return {
        "tokens": torch.tensor(rng.integers(0, VOCABULARY, document.shape)),
        "targets": torch.tensor(rng.integers(0, VOCABULARY, document.shape)),
        "document": torch.tensor(document, dtype=torch.int32),
        "position": torch.tensor(position, dtype=torch.int32),
        "cell": torch.tensor(rng.integers(-1, GRID**2, document.shape), dtype=torch.int32),
        "loss_weight": torch.tensor(weight, dtype=torch.float32),
        "modality": torch.tensor(rng.integers(0, 3, document.shape)),
    }


def naive_logits(model: Decoder, tokens: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(n, V) float64 logits of one document by loops over heads and positions, from the papers' descriptions."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    c = model.config
    is_llama = c.family in ("llama", "chameleon")
    head_size, kv_heads = c.width // c.heads, c.kv_heads or c.heads

    def layer_norm(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        if not is_llama:
            return layer_norm(x)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * weights[name + ".weight"]

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        """RoPE: the pair (i, i + K/2) of a head as a complex number, times e^(i position base^(-2i/K))."""
        half = head_size // 2
        angles = position * c.rope_base ** (-2 * np.arange(half) / head_size)
        pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag])

    gelu = np.vectorize(lambda value: 0.5 * value * (1 + math.erf(value / math.sqrt(2))))
    x = weights["token_embedding.weight"][tokens]
    if not is_llama:
        x = x + weights["position_embedding.weight"][: len(tokens)]
    for s in np.flatnonzero(cells >= 0) if c.picture_grid else ():
        row, column = divmod(cells[s], c.picture_grid)
        x[s] = x[s] + weights["cell_embedding.row.weight"][row] + weights["cell_embedding.column.weight"][column]
    for layer in range(c.layers):
        at = f"blocks.{layer}."
        normed = x if c.norm_after else norm(x, at + "attention_norm")
        qkv = (normed @ weights[at + "attention.qkv.weight"].T).reshape(len(tokens), -1, head_size)
        q, k, v = np.split(qkv, [c.heads, c.heads + kv_heads], axis=1)
        if c.family == "chameleon":
            gain = weights[at + "attention.qk_norm.weight"].reshape(-1, head_size)
            bias = weights[at + "attention.qk_norm.bias"].reshape(-1, head_size)
            q = layer_norm(q) * gain[: c.heads] + bias[: c.heads]
            k = layer_norm(k) * gain[c.heads :] + bias[c.heads :]
        if is_llama:
            q, k = (np.array([[turned(x, s) for x in side[s]] for s in range(len(tokens))]) for side in (q, k))
        attended = np.zeros_like(q)
        for head in range(c.heads):
            shared = head * kv_heads // c.heads
            for s in range(len(tokens)):
                scores = k[: s + 1, shared] @ q[s, head] / math.sqrt(head_size)
                weight = np.exp(scores - scores.max())
                attended[s, head] = weight / weight.sum() @ v[: s + 1, shared]
        output = attended.reshape(len(tokens), -1) @ weights[at + "attention.out.weight"].T
        x = x + (norm(output, at + "attention_norm") if c.norm_after else output)
        hidden = (x if c.norm_after else norm(x, at + "ffn_norm")) @ weights[at + "ffn.wide.weight"].T
        if is_llama:
            gate, up = np.split(hidden, 2, axis=-1)
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            hidden = np.maximum(hidden, 0) if c.activation == "relu" else gelu(hidden)
        output = hidden @ weights[at + "ffn.out.weight"].T
        x = x + (norm(output, at + "ffn_norm") if c.norm_after else output)
    head = "token_embedding.weight" if c.tie_embeddings else "head.weight"
    return norm(x, "final_norm") @ weights[head].T


def documents_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, np.ndarray]]:
    """(row, columns) of every document."""
    ids = batch["document"].numpy()
    return [(row, np.flatnonzero(ids[row] == d)) for row in range(len(ids)) for d in range(ids[row].max() + 1)]


@pytest.mark.parametrize(
    "changes",
    [{"z_loss": 0.1}, {"tie_embeddings": False, "ffn_width": 56, "activation": "gelu"}, {"attention": "sdpa"}],
)
def test_the_loss_is_that_of_a_naive_float64_computation(variant: str, changes: dict) -> None:
    model, batch = build(small(variant, **changes)), packed_batch()
    z_loss = model.config.z_loss
    total, by_modality = 0.0, np.zeros((3, 2))
    for row, columns in documents_of(batch):
        field = {name: tensor[row].numpy()[columns] for name, tensor in batch.items()}
        logits = naive_logits(model, field["tokens"], field["cell"])
        log_z = np.log(np.exp(logits).sum(-1))
        loss = log_z - logits[np.arange(len(columns)), field["targets"]]
        total += float(((loss + z_loss * log_z**2) * field["loss_weight"]).sum())
        for t in np.flatnonzero(field["loss_weight"]):
            by_modality[field["modality"][t]] += loss[t], 1
    sums = model(**batch)
    assert sums.total.dtype == torch.float32
    assert sums.total.item() == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(sums.by_modality.numpy(), by_modality, rtol=1e-5)
    assert not sums.by_modality.requires_grad


def test_packed_documents_never_see_each_other(variant: str) -> None:
    """Bit for bit: what other documents of the row hold changes nothing."""
    model, batch = build(small(variant)), packed_batch()
    before = model.logits(batch["tokens"], batch["document"], batch["position"], batch["cell"])
    for row, columns in documents_of(batch)[:3]:
        others = torch.ones_like(batch["tokens"], dtype=torch.bool)
        others[row, columns] = False
        changed = torch.where(others, (batch["tokens"] + 7) % VOCABULARY, batch["tokens"])
        after = model.logits(changed, batch["document"], batch["position"], batch["cell"])
        assert torch.equal(after[row, columns], before[row, columns])
        assert not torch.equal(after, before)


def test_no_gradient_flows_into_another_document_or_the_future(variant: str) -> None:
    model, batch = build(small(variant)), packed_batch()
    embedded = []
    model.token_embedding.register_forward_hook(lambda _, __, output: embedded.append(output) or output.retain_grad())
    logits = model.logits(batch["tokens"], batch["document"], batch["position"], batch["cell"])
    logits[0, 15].sum().backward()
    reached = torch.nonzero(embedded[0].grad.abs().sum(-1))
    assert reached.tolist() == [[0, column] for column in range(10, 16)]


def test_a_packed_document_has_the_logits_it_has_alone(variant: str) -> None:
    model, batch = build(small(variant)), packed_batch()
    packed = model.logits(batch["tokens"], batch["document"], batch["position"], batch["cell"])
    for row, columns in documents_of(batch):
        tokens = batch["tokens"][row, columns][None]
        cell = batch["cell"][row, columns][None]
        alone = model.logits(tokens, torch.zeros_like(tokens), torch.arange(len(columns))[None], cell)
        torch.testing.assert_close(packed[row, columns], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(variant: str, dropout: float) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(small(variant, activation_checkpointing=checkpointing, dropout=dropout))
        torch.manual_seed(5)
        model(**packed_batch()).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_dropout_zeroes_what_a_block_adds_and_is_off_in_evaluation() -> None:
    model, plain = build(small("llama", layers=1, dropout=0.5)), build(small("llama", layers=1))
    inputs, added = [packed_batch()[name] for name in ("tokens", "document", "position", "cell")], {}

    def logits(model: Decoder) -> torch.Tensor:
        parts = [(model.blocks[0].attention, "attention"), (model.blocks[0].ffn, "ffn")]
        hooks = [part.register_forward_hook(lambda *a, n=name: added.update({n: a[2]})) for part, name in parts]
        hooks.append(model.final_norm.register_forward_pre_hook(lambda _, x: added.update(x=x[0])))
        hooks.append(model.blocks[0].register_forward_pre_hook(lambda _, x: added.update(embedded=x[0])))
        result = model.logits(*inputs)
        for hook in hooks:
            hook.remove()
        return result

    assert torch.equal(logits(model.eval()), logits(plain))
    torch.manual_seed(0)
    logits(model.train())
    torch.manual_seed(0)
    masks = [F.dropout(torch.ones_like(added["x"]), 0.5) for _ in range(2)]
    expected = added["embedded"] + masks[0] * added["attention"] + masks[1] * added["ffn"]
    assert 0.4 < (masks[0] == 0).float().mean() < 0.6 and set(masks[0].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(added["x"], expected)


def test_decoding_with_the_cache_gives_the_logits_of_the_whole_sequence(variant: str) -> None:
    model = build(small(variant))
    tokens, cell = packed_batch()["tokens"], packed_batch()["cell"]
    batch, length = tokens.shape
    position = torch.arange(length).expand(batch, length)
    whole = model.logits(tokens, torch.zeros_like(tokens), position, cell)
    causal = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    cache = model.new_cache(batch, length)
    end = 0
    for size in (5, 1, 1, 9, 1, 11):
        start, end = end, end + size
        new = slice(start, end)
        logits = model.decode(tokens[:, new], position[:, new], cell[:, new], causal[:, :, new, :end], cache)
        torch.testing.assert_close(logits, whole[:, end - 1], rtol=1e-5, atol=1e-5)
    assert cache.length == end == length


def test_a_tied_head_is_counted_once_and_an_untied_one_twice() -> None:
    tied, untied = (count_parameters(small(tie_embeddings=tie), VOCABULARY, POSITIONS) for tie in (True, False))
    assert untied - tied == VOCABULARY * 24


def test_initialization_follows_the_paper() -> None:
    config = ModelConfig(layers=2, width=256, heads=4)
    model = build_model(config, 2000, 1500)
    model.initialize(3)
    weights = dict(model.named_parameters())
    # A normal cut at 3 sigma has a standard deviation of 0.9866 sigma.
    for name in ("token_embedding.weight", "blocks.0.attention.qkv.weight", "blocks.1.ffn.wide.weight"):
        assert weights[name].std().item() == pytest.approx(0.9866 * 0.006, rel=0.01)
        assert weights[name].mean().item() == pytest.approx(0, abs=1e-4)
        assert 0.9 * 0.018 < weights[name].abs().max().item() <= 0.018
    assert weights["position_embedding.weight"].std().item() == pytest.approx(0.9866 * 0.0002, rel=0.01)
    for block in range(2):
        assert not weights[f"blocks.{block}.attention.out.weight"].any()
        assert not weights[f"blocks.{block}.ffn.out.weight"].any()


def test_norms_start_neutral_and_have_no_weight_decay() -> None:
    model = build_model(small("chameleon"), VOCABULARY, POSITIONS)
    model.initialize(3)
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    assert len(vectors) == 3 * 4 + 1  # three blocks: two RMSNorms, gain and bias of the query and key norm
    for name, vector in vectors.items():
        assert torch.equal(vector, torch.zeros_like(vector) if name.endswith("bias") else torch.ones_like(vector))


def test_the_feed_forward_width_of_chameleon_is_that_of_llama() -> None:
    widths = {4096: 11008, 8192: 22016, 256: 768}
    assert {width: ModelConfig(family="chameleon", width=width).feed_forward_width for width in widths} == widths


def test_the_seed_decides_the_initialization(variant: str) -> None:
    def flat(seed: int) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in build(small(variant), seed).parameters()])

    assert torch.equal(flat(1), flat(1))
    assert not torch.equal(flat(1), flat(2))


def test_every_parameter_gets_a_gradient(variant: str) -> None:
    model = build(small(variant, tie_embeddings=False))
    model(**packed_batch()).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
