"""From words to pictures and back with real tokenizers and an untrained model: every task, alone and in a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmtrain.config import ImageTokenizerConfig, ModelConfig, TextTokenizerConfig, UserError
from mmtrain.generate import Request, Sample, Sampled, Sampler, SamplingSettings
from mmtrain.models import build_model
from mmtrain.objective import caption_prompt, picture_cells
from mmtrain.tokens import ImageTokenizer, TextTokenizer, Vocabulary

SIZE, GRID, CELL = 32, 4, 8
WORDS = "a red circle and two blue squares"
GUIDED = SamplingSettings(guidance=2.0)
BOX = (9, 15, 17, 25)  # widened to whole codes: columns 1 and 2 of rows 1 to 3


def new_sampler(batch_size: int, order: str = "text_first", positions: int = 96) -> Sampler:
    torch.manual_seed(0)  # the weights of the image tokenizer
    text = TextTokenizer.train([WORDS] * 3, TextTokenizerConfig(vocab_size=290))
    image = ImageTokenizer(ImageTokenizerConfig(levels=[4, 4], width=8), SIZE).eval()
    with torch.no_grad():  # untrained it would give every picture the same codes
        image.encoder[-1].weight *= 30
    vocabulary = Vocabulary(text.size, image.num_codes, 5)
    config = ModelConfig(
        layers=2, width=32, heads=2, init_std=0.2, position_init_std=0.2, zero_init_outputs=False, picture_grid=GRID
    )
    model = build_model(config, vocabulary.size, positions)
    model.initialize(0)
    return Sampler(model.eval(), vocabulary, text, image, batch_size, order)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return new_sampler(3)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return np.stack([noise, np.where(np.arange(SIZE)[:, None, None] < 16, noise // 8, 255).astype(np.uint8)])


def requests_of(kind: str, pictures: np.ndarray) -> list[Request]:
    texts = {"infill_text": ["a [MASK] circle and [MASK] squares", "two [MASK]"], "caption": ["", ""]}
    words = texts.get(kind, ["a red circle", "two"])
    shown = pictures if kind in ("caption", "question", "infill_image") else [None, pictures[1]]
    shown = [None, None] if kind in ("image", "interleaved") else shown
    return [Request(text, picture, seed=7) for text, picture in zip(words, shown, strict=True)]


def run(sampler: Sampler, kind: str, requests: list[Request], num_samples: int = 2, **best_of) -> list[Sample]:
    tasks = sampler.tasks(kind, requests, GUIDED, max_text_tokens=6, max_tokens=24, region=BOX)
    return list(sampler.draw(tasks, GUIDED, num_samples, **best_of))


def same(a: Sample, b: Sample) -> bool:
    def parts(sample: Sample) -> list:
        return [part if isinstance(part, str) else part.tobytes() for part in sample.parts]

    return parts(a) == parts(b) and a.key == b.key and a.num_tokens == b.num_tokens


KINDS = ("image", "caption", "question", "infill_text", "infill_image", "interleaved")


@pytest.mark.parametrize("order", ["text_first", "image_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_same_alone_and_in_a_batch(kind: str, order: str, pictures: np.ndarray) -> None:
    together = new_sampler(3, order)
    one_by_one = replace(together, batch_size=1)
    requests = requests_of(kind, pictures)
    samples = run(together, kind, requests)
    assert [(s.prompt, s.number) for s in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    alone = run(one_by_one, kind, requests[1:])
    assert all(same(a, b) for a, b in zip(samples[2:], alone, strict=True))
    assert not same(samples[0], samples[1])
    assert all(np.isfinite(s.log_probability) and s.log_probability < 0 for s in samples)


def test_equal_prompts_get_samples_of_their_own_and_a_seed_counts(sampler: Sampler) -> None:
    twice = run(sampler, "image", [Request("a red circle")] * 2, 1)
    other = run(sampler, "image", [Request("a red circle", seed=1)], 1)
    assert len({s.pixels.tobytes() for s in [*twice, *other]}) == 3


def test_what_is_outside_the_region_stays_to_the_last_byte(sampler: Sampler, pictures: np.ndarray) -> None:
    (sample,) = run(sampler, "infill_image", [Request("a circle", pictures[0])], 1)
    inside = np.zeros((SIZE, SIZE), dtype=bool)
    inside[8:32, 8:24] = True
    assert np.array_equal(sample.pixels[~inside], pictures[0][~inside])
    (task,) = sampler.tasks("infill_image", [Request("a circle", pictures[0])], GUIDED, region=BOX)
    written = [5, 6, 9, 10, 13, 14]
    v, codes = sampler.vocabulary, sampler.image.encode(pictures[:1])[0]
    new: list[int] = []
    for row, pair in enumerate(([1, 2], [3, 4], [5, 6])):
        new += [v.sentinel_start + row, *(v.image_start + code for code in pair), v.eoss]
    (drawn,) = task.read(np.array(new[1:]))
    codes[written] = [1, 2, 3, 4, 5, 6]
    assert np.array_equal(drawn, codes)


def test_the_words_of_a_masked_caption_stay(sampler: Sampler) -> None:
    v = sampler.vocabulary
    (task,) = sampler.tasks("infill_text", [Request("a [MASK] circle and [MASK] blue squares")], GUIDED)
    red, two = ([v.text_start + id for id in sampler.text.encode(word)] for word in (" red", " two"))
    new = np.array([*red, v.eoss, v.sentinel_start + 1, *two, v.eoss])
    assert task.read(new) == ["a red circle and two blue squares"]


def test_a_run_with_pictures_first_is_asked_in_its_order(pictures: np.ndarray) -> None:
    sampler = new_sampler(1, "image_first")
    v = sampler.vocabulary
    codes = [v.image_start + int(code) for code in sampler.image.encode(pictures[:1])[0]]
    red, circle = ([v.text_start + id for id in sampler.text.encode(word)] for word in (" red", " circle"))
    (task,) = sampler.tasks("infill_text", [Request("[MASK] circle", pictures[0])], GUIDED)
    assert task.streams[0].tolist() == [v.eos, *codes, v.brk, v.sentinel_start, *circle, v.eos, v.sentinel_start]
    assert task.read(np.array([*red, v.eoss])) == [" red circle"]
    (task,) = sampler.tasks("caption", [Request(picture=pictures[0])], GUIDED)
    assert task.streams[0].tolist() == [v.eos, *codes, v.brk]
    assert (task.grammar.class_of == task.grammar.class_of[v.eos]).sum() == 1  # <eos> ends it


def test_streams_of_guidance(sampler: Sampler, pictures: np.ndarray) -> None:
    v = sampler.vocabulary
    document = np.array([v.text_start, v.brk, *[v.image_start] * 16])
    request = Request("two", retrieved=[document])

    def streams(kind: str, settings: SamplingSettings, request: Request = request) -> list[list[int]]:
        (task,) = sampler.tasks(kind, [request], settings, region=(0, 0, SIZE, 8), max_tokens=20)
        assert task.num_retrieved == len(request.retrieved)
        return [ids.tolist() for ids in task.streams]

    words, s0, s1 = [v.text_start + id for id in sampler.text.encode("two")], v.sentinel_start, v.sentinel_start + 1
    full, background = [v.eos, *document, v.brk, *words, v.brk], [v.eos, *document, v.brk]
    assert streams("image", SamplingSettings()) == [full]
    assert streams("image", GUIDED) == [background, full]
    assert streams("image", SamplingSettings(contrastive_k=2)) == [background, full]
    both = SamplingSettings(guidance=3.0, retrieval_guidance=2.0)
    assert streams("image", both) == streams("interleaved", both) == [[v.eos, s0, v.brk], background, full]
    assert streams("image", both, Request("two")) == [[v.eos, s0, v.brk], [v.eos, *words, v.brk]]
    codes = [v.image_start + int(code) for code in sampler.image.encode(pictures[:1])[0][4:]]
    without, with_words = streams("infill_image", GUIDED, Request("two", pictures[0]))
    assert with_words == [v.eos, *words, v.brk, s0, *codes, v.eos, s0]
    assert without == [v.eos, s1, v.brk, s0, *codes, v.eos, s0]


def test_answers_are_text_and_no_longer_than_asked(sampler: Sampler, pictures: np.ndarray) -> None:
    for kind in ("caption", "question"):
        for sample in run(sampler, kind, requests_of(kind, pictures), 1):
            assert 1 < sample.num_tokens <= 7
            assert sample.text


def test_interleaved_has_whole_pictures_and_text_in_order(sampler: Sampler) -> None:
    samples = run(sampler, "interleaved", [Request("a red circle")], 12)
    assert all(part.shape == (SIZE, SIZE, 3) for s in samples for part in s.parts if not isinstance(part, str))
    assert any(isinstance(part, np.ndarray) for s in samples for part in s.parts)
    assert any(isinstance(part, str) for s in samples for part in s.parts)


def test_the_best_candidate_is_kept_with_the_scores_of_all(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request("a red circle"), Request("two")]
    candidates = run(sampler, "image", requests, 1, best_of=1)
    for scorer in ("caption", "likelihood"):
        best = run(sampler, "image", requests, 2, best_of=4, scorer=scorer)
        for sample in best:
            assert len(sample.scores) == 4 and sample.key[-1] == int(np.argmax(sample.scores))
        assert candidates[0].key == (*best[0].key[:-1], 0)
    assert candidates[0].scores == ()


def test_the_caption_scorer_is_the_probability_of_the_caption(sampler: Sampler) -> None:
    """Against the logits of the whole sequence, without a cache."""
    v = sampler.vocabulary
    (task,) = sampler.tasks("image", [Request("two")], SamplingSettings())
    new = np.arange(16) % sampler.image.num_codes + v.image_start
    (found,) = sampler._scores([task], [Sampled(new, np.zeros(16, np.float32))], "caption")
    words = [v.text_start + id for id in sampler.text.encode("two")] + [v.eoss]
    prompt = caption_prompt(new, [], v)
    ids = np.concatenate([prompt, words]).astype(np.int64)
    tokens, cells = torch.tensor(ids)[None], torch.tensor(picture_cells(ids, v))[None]
    with torch.no_grad():
        logits = sampler.model.logits(tokens, torch.zeros_like(tokens), torch.arange(len(ids))[None], cells)[0]
    total = 0.0
    for i, id in enumerate(words):
        allowed = list(range(v.text_start, v.text_end)) if i < len(words) - 1 else [v.eoss]
        allowed += [v.eoss] if 0 < i < len(words) - 1 else []
        row = logits[len(prompt) - 1 + i, allowed].log_softmax(-1)
        total += float(row[allowed.index(id)])
    assert found == pytest.approx(total, abs=1e-4)


def test_retrieved_documents_that_do_not_fit_are_left_out_and_examples_are_refused(sampler: Sampler) -> None:
    v = sampler.vocabulary
    short, long = (np.full(n, v.text_start, dtype=v.dtype) for n in (3, 500))
    with_both, with_short, without = (
        sampler.images(["a"], GUIDED, 0, retrieved=[documents]) for documents in ([short, long], [short], [])
    )
    assert [s.num_retrieved for s in (with_both[0], with_short[0], without[0])] == [1, 1, 0]
    assert np.array_equal(with_both[0].pixels, with_short[0].pixels)
    assert not np.array_equal(with_both[0].pixels, without[0].pixels)
    with pytest.raises(UserError, match="the examples take 505 tokens, and beside it 77 of the model's 96 positions"):
        sampler.tasks("image", [Request("a", retrieved=[short, long], examples=True)], GUIDED)


@pytest.mark.parametrize(
    ("kind", "request_", "sentence"),
    [
        ("image", Request(" \n", name="prompt 2"), "prompt 2 is empty; write a caption"),
        ("question", Request("", np.zeros((SIZE, SIZE, 3), np.uint8)), "write a question"),
        ("image", Request("a red circle " * 40), "exceed the model's 96 positions; shorten it"),
        ("question", Request("why? " * 60, np.zeros((SIZE, SIZE, 3), np.uint8)), "exceed the model's 96 positions"),
        ("infill_text", Request("a [MASK]" * 30), "30 masked spans need as many sentinels, and the vocabulary has 5"),
        ("infill_text", Request("a [mask] circle"), r"has no \[MASK\]"),
    ],
)
def test_a_request_that_cannot_be_sampled_is_refused(
    sampler: Sampler, kind: str, request_: Request, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        sampler.tasks(kind, [request_], GUIDED)


@pytest.mark.parametrize(
    ("region", "sentence"),
    [((), "must be .left,top,right,bottom"), ((0, 0, 33, 8), "no rectangle inside"), ((8, 0, 8, 8), "no rectangle")],
)
def test_a_region_that_is_none_is_refused(
    sampler: Sampler, pictures: np.ndarray, region: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        sampler.tasks("infill_image", [Request("", pictures[0])], GUIDED, region=region)


def test_text_is_handed_on_as_it_is_written(pictures: np.ndarray) -> None:
    sampler, heard = new_sampler(4), []
    sampler.stream = heard.append
    (sample,) = run(sampler, "caption", [Request(picture=pictures[0])], 1)
    assert sample.text.startswith("".join(heard)) and heard
    heard.clear()
    run(sampler, "caption", [Request(picture=pictures[0])], 2)
    assert not heard
