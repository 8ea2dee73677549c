"""Hugging Face folders: a trained model goes out as one, one of OPT, Llama or Chameleon comes in.

Needs safetensors and JSON only, transformers is for those who load what was exported. Never loads a pickle.
"""

from mmtrain.models.huggingface.exporting import check_exportable, export_folder
from mmtrain.models.huggingface.importing import import_folder

__all__ = ["check_exportable", "export_folder", "import_folder"]
