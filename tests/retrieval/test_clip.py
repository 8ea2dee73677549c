import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import decode_square
from mmtrain.retrieval import Memory, Neighbours, build_neighbours, open_encoder
from tests.retrieval.conftest import pair

transformers = pytest.importorskip("transformers")

TEXTS = ["a red fox", "two blue whales and a very long tail " * 9, "?!"]
MEAN, DEVIATION = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory) -> Path:
    """A model with random weights and a real tokenizer, saved as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    captions = [*TEXTS, *(pair(i).texts[0] for i in range(9))]
    words.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special))
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if request.param == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    out = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": DEVIATION}))
    return out


def encoder_of(folder: Path):
    return open_encoder(RetrievalConfig(encoder="clip", encoder_path=str(folder)))


def test_vectors_are_those_of_transformers(folder):
    encoder = encoder_of(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS[:2], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    if model.config.model_type == "siglip":
        tokens.pop("attention_mask")
    tokens.pop("token_type_ids", None)
    pixels = np.stack([decode_square(pair(i).images[0].data, 32) for i in range(3)])
    batch = (torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        DEVIATION
    ).view(3, 1, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        text = model.get_text_features(**tokens).pooler_output
        text_flops = counter.get_total_flops()
        image = model.get_image_features(pixel_values=batch).pooler_output
    for found, expected in ((encoder.encode_texts(TEXTS)[:2], text), (encoder.encode_pictures(pixels), image)):
        assert np.allclose(found, torch.nn.functional.normalize(expected, dim=-1).numpy(), atol=1e-5)
        assert found.shape[1] == encoder.dimension and found.dtype == np.float32
    assert not encoder.encode_texts(TEXTS)[2].any()
    # Counted on a CPU, attention by SDPA is left out: a few percent of so small a model.
    assert text_flops <= encoder.flops and encoder.flops > 0


def test_a_text_alone_has_the_vector_it_has_in_a_batch(folder):
    encoder = encoder_of(folder)
    batch = encoder.encode_texts(TEXTS)
    assert np.allclose(encoder.encode_texts(TEXTS[:1])[0], batch[0], atol=1e-6)
    before = encoder.flops
    encoder.encode_texts(TEXTS[:1])
    one = encoder.flops - before
    encoder.encode_texts(["a", "b", "-"])
    assert encoder.flops - before == 3 * one


def test_neighbours_by_a_learned_encoder(folder, shards, tmp_path):
    shards("train", map(pair, range(20)))
    config = RetrievalConfig(encoder="clip", encoder_path=str(folder), num_candidates=2, max_score=1.0)
    build_neighbours({"train": tmp_path / "train"}, config, tmp_path / "out", 0)
    assert all(len(Neighbours(tmp_path / "out/train").candidates(i)) >= 2 for i in range(20))
    assert json.loads((tmp_path / "out/flops.json").read_text())["retrieval_encode"] > 0
    memory = Memory(tmp_path / "out/memory")
    assert not memory.means.any() and len(memory.search("a photograph of a zebra", None, 3)) == 3


def test_other_models_and_broken_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="holds no CLIP or SigLIP model"):
        encoder_of(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="holds no CLIP or SigLIP model"):
        encoder_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="model of type gpt2"):
        encoder_of(tmp_path)
