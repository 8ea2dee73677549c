"""Start a run from a weights folder: known tokens keep their rows, new ones get rows that disturb nothing.

V vocabulary, D width.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmtrain.config import UserError
from mmtrain.config.weights import VOCABULARY, WeightsFolder, open_weights
from mmtrain.models.decoder import Decoder
from mmtrain.models.huggingface.importing import OF_THE_VOCABULARY
from mmtrain.models.huggingface.shards import TensorFiles, file_facts
from mmtrain.tokens import Vocabulary
from mmtrain.tokens.vocabulary import SPECIALS

HEAD_NOISE = 0.01
TIED_NOISE = 0.5


@torch.no_grad()
def load_weights(model: Decoder, path: Path, vocabulary: Vocabulary, seed: int) -> None:
    """Copy the folder's tensors into `model`, whose vocabulary is the folder's text with the run's other tokens.

    Rows of specials, text, image codes and sentinels that the folder knows are copied bit by bit; the others are
    drawn by `new_rows`, keyed by `seed`. Raises UserError for another vocabulary of text or another model.
    """
    folder = open_weights(path)
    source = Vocabulary.load(path / VOCABULARY)
    ours, theirs = known_tokens(vocabulary, source, folder)
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("cell_embedding.")}
    with TensorFiles(path) as files:
        for name in sorted(parameters.keys() ^ files.shapes.keys()):
            raise UserError(f"model.weights={path} is of another model: only one of the two has {name}")
        for name, parameter in parameters.items():
            rows = source.size if name in OF_THE_VOCABULARY else len(parameter)
            if files.shapes[name] != (rows, *parameter.shape[1:]):
                shape = list(parameter.shape)
                raise UserError(
                    f"model.weights={path} is of another model: {name} has shape {list(files.shapes[name])}, the "
                    f"config asks for {shape}"
                )
            loaded = files[name]
            if name not in OF_THE_VOCABULARY:
                parameter.copy_(loaded)
                continue
            known = loaded[theirs].to(parameter)
            is_new = torch.ones(len(parameter), dtype=torch.bool)
            is_new[ours] = False
            noise = HEAD_NOISE if name == "head.weight" else TIED_NOISE if model.config.tie_embeddings else 1.0
            parameter[ours.to(parameter.device)] = known
            drawn = new_rows(known.cpu(), int(is_new.sum()), noise, seed + OF_THE_VOCABULARY.index(name))
            parameter[is_new.to(parameter.device)] = drawn.to(parameter)


def known_tokens(vocabulary: Vocabulary, source: Vocabulary, folder: WeightsFolder) -> tuple[Tensor, Tensor]:
    """Ids of the run and of the folder, (N,) int64 each, of the tokens that both have."""
    if vocabulary.text_size != source.text_size:
        raise UserError(
            f"model.weights={folder.path} has {source.text_size} entries of text, this run's tokenizer "
            f"{vocabulary.text_size}; use the tokenizer of the weights: leave text_tokenizer.path out"
        )
    images = range(min(vocabulary.image_codes, source.image_codes))
    sentinels = range(min(vocabulary.num_sentinels, source.num_sentinels))
    same = range(len(SPECIALS) + source.text_size)
    new = set(folder.facts["new_rows"])
    pairs = [(id, id) for id in same]
    pairs += [(vocabulary.image_start + i, source.image_start + i) for i in images]
    pairs += [(vocabulary.sentinel_start + i, source.sentinel_start + i) for i in sentinels]
    ours, theirs = torch.tensor([pair for pair in pairs if pair[1] not in new], dtype=torch.int64).T
    return ours, theirs


def new_rows(known_ND: Tensor, number: int, noise: float, seed: int) -> Tensor:
    """(number, D) float32 rows: the mean of the known ones, and normal noise of `noise` times their std by channel.

    An input row has noise 1: it is like any other. An output row has nearly none: its logit is the mean of the known
    logits, so by Jensen's inequality its probability is at most the average one, whatever the context. A row that is
    both has half: apart from its neighbors, and still more central than they are.
    """
    mean, std = known_ND.float().mean(0), known_ND.float().std(0, correction=0)
    generator = torch.Generator().manual_seed(seed)
    return mean + noise * std * torch.randn(number, len(mean), generator=generator)


def verify_weights(path: Path) -> WeightsFolder:
    """The folder, after every byte of it was compared with its hash; raises UserError naming the file that differs."""
    folder = open_weights(path)
    try:
        found = file_facts(path, list(folder.facts["files"]))
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.weights={path} cannot be read ({error}); import it again") from error
    for name, entry in folder.facts["files"].items():
        if found[name] != entry:
            raise UserError(f"model.weights={path} is damaged: {name} is not as it was written; import it again")
    return folder
