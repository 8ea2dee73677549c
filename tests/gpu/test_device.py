"""On a CUDA device: one training step, attention, checkpoint and sampling. Skipped where there is none."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config import Config, ModelConfig
from mmtrain.generate import Grammar, Prompt, SamplingSettings, sample, score
from mmtrain.models import Decoder, build_model
from mmtrain.tokens import Vocabulary
from mmtrain.train.checkpoint import fill, load_model, read_checkpoint
from mmtrain.train.distributed import World, start_world
from mmtrain.train.engine import Engine, build_engine
from mmtrain.train.fragments import Fragment
from mmtrain.train.launch import free_port
from mmtrain.train.saving import Saver

pytestmark = pytest.mark.gpu
VOCABULARY, LENGTH, ROWS = 512, 256, 4
FINGERPRINT = "0123456789ab"
ENGINES = [("ddp", 0, "fp32"), ("ddp", 0, "bf16"), ("deepspeed", 1, "fp32"), ("deepspeed", 1, "bf16")]
ENGINES += [("deepspeed", 2, "bf16"), ("deepspeed", 3, "bf16")]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of this process alone, on NCCL."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            patch.setenv(name, value)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        yield start_world()
        torch.distributed.destroy_process_group()


def configure(kind: str = "ddp", stage: int = 0, dtype: str = "fp32") -> Config:
    config = Config()
    config.engine.kind, config.engine.stage, config.engine.dtype = kind, stage, dtype
    config.model = ModelConfig(layers=2, width=128, heads=2, init_std=0.05, zero_init_outputs=False)
    config.stream.global_batch, config.stream.sequence_length = ROWS, LENGTH
    return config


def new_model(config: Config) -> Decoder:
    model = build_model(config.model, VOCABULARY, LENGTH)
    model.initialize(0)
    return model


def batch(step: int, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Packed rows: documents of 100, 120 and 30 tokens, and 6 of padding."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    lengths = (100, 120, 30, 6)
    document = torch.cat([torch.full((n,), number if n > 6 else -1) for number, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) for n in lengths])
    fields = {
        "tokens": tokens,
        "targets": tokens.roll(-1, 1),
        "document": document.expand(ROWS, LENGTH),
        "position": position.expand(ROWS, LENGTH),
        "cell": torch.full((ROWS, LENGTH), -1),
        "loss_weight": (document >= 0).float().expand(ROWS, LENGTH),
        "modality": tokens % 3,
    }
    return {name: tensor.to(device) for name, tensor in fields.items()}


def train(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        inputs = batch(step)
        weight = inputs["loss_weight"].sum()
        sums = engine.forward(inputs)
        engine.backward(sums.total, weight)
        norm = engine.step(1e-3)
        assert norm is not None and float(norm) > 0
        losses.append(float(sums.total.detach() / weight))
    return losses


def tensors(fragments: list[Fragment]) -> list[tuple[str, torch.Tensor]]:
    return sorted((f"{kind}.{f.name}", tensor) for f in fragments for kind, tensor in f.tensors.items())


def cpu_losses(steps: int) -> list[float]:
    """The same steps in plain torch on the CPU, in float32."""
    config = configure()
    model, o = new_model(config), config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )
    losses = []
    for step in range(steps):
        inputs = batch(step, "cpu")
        loss = model(**inputs).total / inputs["loss_weight"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("kind", "stage", "dtype"), ENGINES)
def test_training_steps_are_those_of_the_cpu(kind: str, stage: int, dtype: str, world: World) -> None:
    config = configure(kind, stage, dtype)
    engine = build_engine(new_model(config).to(world.device), config, world, 1)
    tolerance = 1e-4 if dtype == "fp32" else 1e-2
    assert train(engine, 0, 3) == pytest.approx(cpu_losses(3), rel=tolerance)


@pytest.mark.parametrize(("kind", "stage", "dtype"), ENGINES)
def test_a_checkpoint_continues_on_the_device(kind: str, stage: int, dtype: str, world: World, tmp_path: Path) -> None:
    """Written while the steps after it are done, it has nothing of them."""
    config = configure(kind, stage, dtype)
    model = new_model(config)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    engine = build_engine(model.to(world.device), config, world, 1)
    train(engine, 0, 2)
    saved = [tensor.cpu() for _, tensor in tensors(engine.owned())]
    saver = Saver(tmp_path, world, keep=1)
    saver.save(engine.owned(), shapes, {"step": 2, "updates": engine.updates(), "vocabulary": FINGERPRINT})
    expected = train(engine, 2, 4)
    assert saver.wait() is None

    found = read_checkpoint(tmp_path / "step-00000002")
    resumed = build_engine(new_model(config).to(world.device), config, world, 1)
    fill(found, resumed.held())
    resumed.restored(found.state["updates"])
    assert all(torch.equal(t.cpu(), s) for (_, t), s in zip(tensors(resumed.owned()), saved, strict=True))
    assert train(resumed, 2, 4) == pytest.approx(expected, rel=1e-5 if dtype == "fp32" else 1e-3)
    assert load_model(found, config, VOCABULARY, FINGERPRINT).max_positions == LENGTH


def test_logits_are_those_of_the_cpu() -> None:
    model = new_model(configure()).eval()
    inputs = batch(0, "cpu")
    names = ("tokens", "document", "position", "cell")
    with torch.inference_mode():
        expected = model.logits(*(inputs[name] for name in names))
        found = model.to("cuda").logits(*(inputs[name].to("cuda") for name in names))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_never_see_each_other(dtype: torch.dtype) -> None:
    model = new_model(configure()).to("cuda", dtype).eval()
    inputs = batch(0)
    with torch.inference_mode():
        before = model.logits(inputs["tokens"], inputs["document"], inputs["position"], inputs["cell"])
        for number in range(3):
            inside = inputs["document"] == number
            changed = torch.where(inside, inputs["tokens"], (inputs["tokens"] + 7) % VOCABULARY)
            after = model.logits(changed, inputs["document"], inputs["position"], inputs["cell"])
            assert torch.equal(after[inside], before[inside])


def test_activation_checkpointing_and_the_chunked_head_agree_with_the_plain_step() -> None:
    gradients = []
    for checkpointing, chunk in ((False, 10**6), (True, 100)):
        config = configure()
        config.model.activation_checkpointing, config.model.loss_chunk = checkpointing, chunk
        model = new_model(config).to("cuda")
        model(**batch(0)).total.div(1000).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_keeps_to_the_grammar_and_to_the_seed(dtype: torch.dtype) -> None:
    model = new_model(configure()).to("cuda", dtype).eval()
    picture = Grammar.picture(Vocabulary(90, 100, 4), np.arange(40))
    ids = [np.array([2, 7, 4]), np.array([2, 8, 9, 10, 4])]
    prompts = [Prompt((np.array([2, 4]), row), picture, (0, i)) for i, row in enumerate(ids)]

    def draw() -> np.ndarray:
        return np.stack([found.tokens for found in sample(model, prompts, SamplingSettings(guidance=2.0))])

    ids = draw()
    assert ids.shape == (2, 40) and ((ids >= 96) & (ids < 196)).all()
    assert np.array_equal(ids, draw())


def test_greedy_samples_and_scores_are_those_of_the_cpu() -> None:
    """Different tasks and lengths: padding, grammars and ended rows on the device."""
    model = new_model(configure()).eval()
    v = Vocabulary(90, 100, 4)
    grammars = [Grammar.picture(v, np.arange(30)), Grammar.text(v, 9, v.eoss), Grammar.interleaved(v, 4, 40)]
    prompts = [Prompt((np.array([2, *range(7, 8 + i), 4]),), g, (0, i)) for i, g in enumerate(grammars)]
    greedy = SamplingSettings(temperature=0)
    expected = sample(model, prompts, greedy)
    found = sample(model.to("cuda"), prompts, greedy)
    assert [x.tokens.tolist() for x in found] == [x.tokens.tolist() for x in expected]
    scores = score(model, prompts, [x.tokens for x in expected])
    for x, y in zip(scores, expected, strict=True):
        np.testing.assert_allclose(x, y.log_probability, atol=1e-3)
