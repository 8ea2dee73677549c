"""What the doctor looks at in the data: a document of each source, and whether the vocabulary is the model's."""

from collections.abc import Iterator
from pathlib import Path

from mmtrain.config import Config, UserError
from mmtrain.track.page import clean
from mmtrain.verbs.doctor_machine import Check

SHOWN = 40  # characters of a text


def check_sources(config: Config) -> Iterator[Check]:
    """One decoded document of each corpus of the run, as far as they are built."""
    for name in config.sources:
        try:
            yield Check("source", "pass", f"{name}: {_sample(config, name)}")
        except UserError as error:
            yield Check("source", "fail", f"{name}: {error}", "")
        except Exception as error:  # damaged shards make readers and decoders raise whatever they like
            mend = f"`mmtrain data verify` names what is damaged; delete it, and `mmtrain data` builds {name} again"
            problem = f"{name}: a document cannot be decoded ({type(error).__name__}: {error})"
            yield Check("source", "fail", problem, mend)


def _sample(config: Config, name: str) -> str:
    """What the first training document of a source holds, its pictures decoded; or that there is none yet."""
    from mmtrain.documents import decode_square
    from mmtrain.shards import DocumentShards
    from mmtrain.verbs.prepare import documents_folder

    if config.sources[name].tokens:
        return "ready token shards; the vocabulary is compared below"
    folder = documents_folder(config, name)
    if not folder.is_dir():
        return "not built yet; `mmtrain data` and `mmtrain train` build it"
    shards = DocumentShards(folder / "train")
    document = shards[0]
    sizes = [f"{image.width}x{image.height}" for image in document.images]
    for image in document.images:
        decode_square(image.data, config.corpus.image_size)
    texts = f'"{clean(document.texts[0], SHOWN)}"' if document.texts else "no text"
    pictures = f"{len(sizes)} pictures decoded ({', '.join(sizes[:3])})" if sizes else "no picture"
    return f"{len(shards):,} documents, the first: {texts}, {pictures}"


def check_vocabulary(config: Config) -> Iterator[Check]:
    """The vocabularies of token shards that are there, and of the run's checkpoint, against the configured model."""
    from mmtrain.tokens import Vocabulary
    from mmtrain.train.run import Artifacts
    from mmtrain.verbs.flops_count import vocabulary_of

    wanted, run_dir = vocabulary_of(config), Path(config.root, config.name)
    if (run_dir / "artifacts.json").is_file():
        artifacts = Artifacts.load(run_dir)
        found = Vocabulary.load(artifacts.tokens[artifacts.main] / "vocabulary.json")
        yield from _of_checkpoint(run_dir, found)
        yield _against(f"{artifacts.tokens[artifacts.main].name} of the run {config.name}", found, wanted)
        return
    for name, corpus in config.sources.items():
        files = sorted(Path(config.data_dir, name).glob("tokens-*/vocabulary.json"))
        known = [(file.parent.name, Vocabulary.load(file)) for file in files]
        fitting = [(folder, found) for folder, found in known if _fits(found, wanted)]
        if fitting:
            yield _against(f"{name}/{fitting[-1][0]}", fitting[-1][1], wanted)
        elif known and corpus.tokens:
            yield _against(f"{name}/{known[-1][0]}", known[-1][1], wanted)
        else:
            other = f"{len(known)} there are of other settings" if known else "there are none"
            detail = f"token shards of {name} are still to be made ({other}); {_words(wanted)}"
            yield Check("vocabulary", "pass", detail)


def _fits(found, wanted) -> bool:
    """A text tokenizer that ran out of pairs has fewer entries than it was asked for."""
    sizes = (found.image_codes, found.num_sentinels) == (wanted.image_codes, wanted.num_sentinels)
    return sizes and found.text_size <= wanted.text_size


def _words(vocabulary) -> str:
    return (
        f"{vocabulary.text_size:,} text ids, {vocabulary.image_codes:,} image codes, {vocabulary.num_sentinels} "
        f"sentinels: {vocabulary.size:,} rows"
    )


def _against(what: str, found, wanted) -> Check:
    if _fits(found, wanted):
        return Check("vocabulary", "pass", f"{what} has that of the model, {_words(found)}")
    mend = "set text_tokenizer, image_tokenizer and objective.num_sentinels as they were, or choose another name="
    return Check("vocabulary", "fail", f"{what} has {_words(found)}; the model would have {_words(wanted)}", mend)


def _of_checkpoint(run_dir: Path, found) -> Iterator[Check]:
    """The newest checkpoint's fingerprint against that of the token shards that the run reads."""
    from mmtrain.train.checkpoint import newest

    checkpoint = newest(run_dir / "checkpoints")
    if checkpoint and checkpoint.state["vocabulary"] != found.fingerprint:
        trained_on = checkpoint.state["vocabulary"]
        detail = f"{checkpoint.path.name} was trained on {trained_on}, the shards have {found.fingerprint}"
        yield Check("vocabulary", "fail", detail, "bring the old data back, or choose another name=")
