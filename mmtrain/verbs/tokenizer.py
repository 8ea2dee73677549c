"""`mmtrain tokenizer text|image`: train one tokenizer of a corpus."""

import os

from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.tokens import TextTokenizer
from mmtrain.track import closing_box
from mmtrain.verbs import prepare


def main(argv: list[str]) -> int:
    """Train the tokenizer that the first word names, or find it."""
    kind, settings = (argv[0], argv[1:]) if argv and "=" not in argv[0] else ("", argv)
    if kind not in ("text", "image"):
        raise UserError(
            f"mmtrain tokenizer {kind or ''}: say which one, `mmtrain tokenizer text` or `mmtrain tokenizer image`"
        )
    config = compose(settings)
    documents = prepare.prepare_documents(config)
    if kind == "text":
        folder = prepare.prepare_text_tokenizer(config, documents)
        tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        places = {"tokenizer": os.path.relpath(folder / "tokenizer.json"), "entries": f"{tokenizer.size:,}"}
    else:
        folder = prepare.prepare_image_tokenizer(config, documents)
        pictures = folder / "reconstructions.png"
        places = {"tokenizer": os.path.relpath(folder), "reconstructions": os.path.relpath(pictures)}
    closing_box(f"{kind} tokenizer of {', '.join(documents)}", places)
    return 0
