"""Every key of the configuration: type, default, meaning, allowed values.

`docs/reference/config.md` is generated from this file. A key that is not here does not exist.
"""

import copy
from dataclasses import dataclass, field
from typing import Any


def knob(default: Any, help: str, *, choices: tuple = (), minimum: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field with its documentation and the values it may take."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class CorpusConfig:
    """Where documents come from."""

    name: str = knob("shapes", "Name of the corpus; its folder under data_dir.")
    kind: str = knob("shapes", "Reader of the corpus.", choices=("shapes", "stamps", "pairs", "img2dataset", "mmc4", "parquet", "webdataset", "html"))
    path: str | None = knob(None, "What to read. pairs: folder of pictures with .txt beside them, or a captions .jsonl or .csv file. img2dataset, webdataset: folder of tars, or one tar. mmc4: .jsonl, .jsonl.zip, .jsonl.gz or tars. parquet: folder of tables, or one. html: folder of pages. stamps: an already extracted folder.")
    tokens: str | None = knob(None, "Folder or URL (s3://, gs://, hf://, https://) of token shards that are ready, a tokens-FINGERPRINT of `mmtrain data`, instead of a corpus to read; with the text_tokenizer.path and image_tokenizer.path that made them.")
    retrieved: str = knob("", "With tokens: where their inlined shards are (`mmtrain retrieval join`), for training with retrieval.")
    image_folder: str | None = knob(None, "mmc4, parquet: folder of downloaded pictures, each named by the SHA-256 of its URL (hexadecimal) or, mmc4, by its image_name.")
    debian_package: str | None = knob(None, "html: Debian package to fetch with apt-get instead of corpus.path.")
    image_size: int = knob(64, "Side of the square pictures, in pixels.", minimum=8)
    languages: list[str] = knob(["en"], "stamps: caption languages; each gives one document per picture.")
    num_documents: int = knob(20000, "shapes: training documents, exact copies included.", minimum=1)
    num_validation: int = knob(500, "shapes: held-out documents, exact copies included.", minimum=1)
    validation_fraction: float = knob(0.06, "Share of the documents held out, by the hash of their near-duplicate cluster (shapes: num_validation).", minimum=0.0, maximum=0.9)
    max_documents: int = knob(0, "Stop after so many documents (0: all; shapes: num_documents).", minimum=0)
    max_pixels: int = knob(50_000_000, "A picture with more pixels is skipped and counted.", minimum=1)
    on_bad: str = knob("drop_image", "What a bad picture does: drop_image = an interleaved document goes on without it (a captioned picture cannot), skip = its document is left out, fail = stop at once.", choices=("drop_image", "skip", "fail"))
    max_bad_fraction: float = knob(0.2, "Stop when a larger share of what was read is damaged.", minimum=0.0, maximum=1.0)
    seed: int = knob(0, "shapes: seed of the scenes.")


@dataclass
class CleanConfig:
    """What of a document is left out by rule, as OBELICS does it (Laurencon et al. 2023, appendix A.1.4); 0 and empty: rule off."""

    picture_min_side: int = knob(0, "Drop pictures with a shorter side, in pixels.", minimum=0)
    picture_max_side: int = knob(0, "Drop pictures with a longer side, in pixels.", minimum=0)
    picture_max_aspect: float = knob(0.0, "Drop pictures whose longer side is more than so many times the shorter.", minimum=0.0)
    picture_banned_words: list[str] = knob([], "Drop pictures whose URL or file name holds one of these, case ignored.")
    picture_once: bool = knob(False, "Drop a picture that the document already had.")
    paragraph_min_words: int = knob(0, "Drop paragraphs (a blank line is between them) of fewer words.", minimum=0)
    paragraph_max_words: int = knob(0, "Drop paragraphs of more words.", minimum=0)
    paragraph_max_character_repetition: float = knob(0.0, "Drop paragraphs with a larger share of repeated runs of 10 characters.", minimum=0.0, maximum=1.0)
    paragraph_max_word_repetition: float = knob(0.0, "Drop paragraphs with a larger share of repeated runs of 5 words.", minimum=0.0, maximum=1.0)
    paragraph_max_special: float = knob(0.0, "Drop paragraphs with a larger share of characters that are no letters, blanks included.", minimum=0.0, maximum=1.0)
    paragraph_min_stopwords: float = knob(0.0, "Drop paragraphs with a smaller share of English function words.", minimum=0.0, maximum=1.0)
    paragraph_min_punctuation: float = knob(0.0, "Drop paragraphs of 12 words or more with a smaller share of , ; : ? ! . among words and marks.", minimum=0.0, maximum=1.0)
    document_min_pictures: int = knob(0, "Drop documents with fewer pictures.", minimum=0)
    document_max_pictures: int = knob(0, "Drop documents with more pictures.", minimum=0)
    document_min_words: int = knob(0, "Drop documents of fewer words.", minimum=0)
    document_max_words: int = knob(0, "Drop documents of more words.", minimum=0)
    document_max_character_repetition: float = knob(0.0, "As for paragraphs.", minimum=0.0, maximum=1.0)
    document_max_word_repetition: float = knob(0.0, "As for paragraphs.", minimum=0.0, maximum=1.0)
    document_max_special: float = knob(0.0, "As for paragraphs.", minimum=0.0, maximum=1.0)
    document_min_stopwords: float = knob(0.0, "As for paragraphs.", minimum=0.0, maximum=1.0)
    document_min_punctuation: float = knob(0.0, "As for paragraphs.", minimum=0.0, maximum=1.0)


@dataclass
class DedupeConfig:
    """Copies and near-duplicates, over the whole corpus. Those kept are held out together or not at all."""

    exact: bool = knob(True, "Drop a document whose texts and pictures are those of an earlier one, byte by byte.")
    near: str = knob("keep", "Near-duplicates of an earlier document: keep them (on one side of the split), or drop them. The captions of one picture are near-duplicates of one another, too.", choices=("keep", "drop"))
    pictures: bool = knob(True, "Documents with the same pictures are near-duplicates.")
    picture_distance: int = knob(3, "Pictures are the same up to so many differing bits of 64 of their perceptual hashes (-1: only the same file).", minimum=-1, maximum=8)
    picture_overlap: float = knob(0.6, "Share of two documents' pictures that both have (Jaccard), from which on they are near-duplicates. At 0.5, a page with nothing but a common icon would join all that have one picture more.", minimum=0.05, maximum=1.0)
    max_picture_uses: int = knob(0, "Drop a picture that is in more documents (OBELICS: 10; 0: keep all). The captions of one picture are several documents.", minimum=0)
    texts: bool = knob(True, "Documents with nearly the same text are near-duplicates.")
    text_similarity: float = knob(0.8, "Share of the runs of five words that two texts have in common (Jaccard), from which on they are nearly the same.", minimum=0.3, maximum=1.0)


@dataclass
class StoreConfig:
    """Where shards come from, and the cache of those that are far away. A local folder is read in place."""

    cache_dir: str = knob("data/cache", "Folder that keeps downloaded shards; on a local disk, shared by all processes of the machine.")
    cache_bytes: int = knob(100_000_000_000, "Largest size of the cache: what was not used for the longest time goes first (0: no limit).", minimum=0)
    schemes: list[str] = knob(["file", "s3", "gs", "hf", "http", "https"], "Kinds of locations that may be read; there are no others.")
    retries: int = knob(5, "Further tries of a download that failed, after pauses of 1, 2, 4, ... seconds.", minimum=0)
    timeout_seconds: float = knob(60.0, "A download that receives nothing for so long has failed.", minimum=0.1)
    prefetch_shards: int = knob(4, "Shards fetched ahead, by as many background threads (0: none).", minimum=0)


@dataclass
class DataConfig:
    """How `mmtrain data` works through a corpus."""

    processes: int = knob(0, "Processes that read, write and tokenize (0: one per core); what they write does not depend on it.", minimum=0)
    shard_bytes: int = knob(256 << 20, "A document shard is closed once it holds so many bytes.", minimum=1)
    shard_documents: int = knob(16_384, "Documents per token shard.", minimum=1)


@dataclass
class TextTokenizerConfig:
    """Byte-level BPE."""

    path: str | None = knob(None, "Use this tokenizer.json instead of training one.")
    vocab_size: int = knob(1024, "Entries to train, the 256 bytes included.", minimum=257)
    max_documents: int = knob(100_000, "Documents to train on.", minimum=1)


@dataclass
class ImageTokenizerConfig:
    """Convolutional autoencoder with a quantizer: one picture becomes (image_size / downsample)^2 codes."""

    path: str | None = knob(None, "Use this trained tokenizer folder instead of training one.")
    quantizer: str = knob("fsq", "Quantizer.", choices=("fsq", "vq", "lfq"))
    levels: list[int] = knob([8, 5, 5, 5], "fsq: levels per channel; their product is the number of codes.")
    codebook_size: int = knob(1024, "vq, lfq: number of codes (lfq: a power of two).", minimum=2)
    encoder: str = knob("conv", "conv = codes see their surroundings (best pictures); patch = each code sees its own patch alone (codes that a language model learns in half the time).", choices=("conv", "patch"))
    downsample: int = knob(8, "Pixels per code along one side, a power of two.", choices=(2, 4, 8, 16, 32))
    width: int = knob(32, "Channels of the first convolution; doubled at each halving up to 4x.", minimum=4)
    latent_dim: int = knob(16, "Channels in front of the quantizer (vq, lfq).", minimum=1)
    steps: int = knob(1500, "Training steps.", minimum=1)
    batch_size: int = knob(32, "Pictures per step.", minimum=1)
    lr: float = knob(1e-3, "Peak learning rate (one cycle).", minimum=0.0)
    max_images: int = knob(50_000, "Pictures to train on.", minimum=1)
    threads: int = knob(1, "CPU threads of training; small pictures gain nothing from more, and lose much on a busy machine.", minimum=1)
    seed: int = knob(0, "Seed of initialization and order.")


@dataclass
class RetrievalConfig:
    """Retrieved documents in front of the query document (CM3leon sec. 2.1)."""

    enabled: bool = knob(True, "Retrieve neighbours and place them before the query document.")
    encoder: str = knob("hashed", "Encoder of documents for the search: hashed words and picture statistics, dual (a small one, trained on the corpus), or clip (CLIP or SigLIP, extra hf).", choices=("hashed", "dual", "clip"))
    encoder_path: str = knob("", "clip: folder or Hugging Face id of a CLIP or SigLIP model. dual: folder of a trained one (empty: train it on the corpus).")
    dimension: int = knob(256, "hashed, dual: size of a document vector.", minimum=8)
    dual_steps: int = knob(300, "dual: training steps.", minimum=1)
    dual_batch: int = knob(128, "dual: pairs per step, each of which is told from all the others.", minimum=2)
    dual_pairs: int = knob(50_000, "dual: most pairs of the training split to train on.", minimum=8)
    dual_lr: float = knob(2e-3, "dual: peak learning rate (one cycle).", minimum=0.0)
    search: str = knob("nearest", "Which documents are candidates: the nearest, or random ones (what retrieval is compared with).", choices=("nearest", "random"))
    num_candidates: int = knob(4, "Candidates stored per document and kind of query, by its text and by its picture (CM3leon: 2 and 2).", minimum=1)
    num_documents: int = knob(2, "Largest number of retrieved documents in a sequence.", minimum=0)
    policy: str = knob("uniform", "Number of retrieved documents: fixed = num_documents (CM3leon), uniform = 0..num_documents (RA-CM3).", choices=("fixed", "uniform"))
    dropout: float = knob(0.0, "Probability of a sequence with no retrieved document.", minimum=0.0, maximum=1.0)
    order: str = knob("random", "Order of the retrieved documents in front of the query: random, or by score.", choices=("random", "best_last", "best_first"))
    max_tokens: int = knob(0, "Most tokens of retrieved documents in a sequence (0: what fits beside the query).", minimum=0)
    modality: str = knob("any", "Documents that may be retrieved: any, or only those with both text and a picture (CM3leon).", choices=("any", "both"))
    block: list[str] = knob([], "Folders of document shards of evaluation sets: what shares 13 words in a row or a picture with them is never retrieved.")
    inlined: bool = knob(False, "Read the candidates' tokens beside each document (inlined shards, written once by a join), not by look-up in the memory's token shards.")
    index: str = knob("auto", "Index of the memory: flat (exact), rabitq, hnsw, ivfpq, or auto by size and index_memory.", choices=("auto", "flat", "rabitq", "hnsw", "ivfpq"))
    index_memory: float = knob(8.0, "Memory that the index may take while it is searched, in GiB.", minimum=0.001)
    max_score: float = knob(0.9, "A neighbour with a higher cosine similarity is a near-duplicate and is left out.", minimum=-1.0, maximum=1.0)
    query_dropout: float = knob(0.2, "Share of the query's words dropped before the search.", minimum=0.0, maximum=0.9)


@dataclass
class ObjectiveConfig:
    """From a document to a training sequence."""

    kind: str = knob("cm3", "cm3 = causal masking with infilling, causal = plain next token.", choices=("cm3", "causal"))
    order: str = knob("text_first", "Order of a caption-image pair.", choices=("text_first", "image_first", "random"))
    masks: str = knob("poisson", "Number of masks per sequence: poisson(num_masks), fixed num_masks, none.", choices=("poisson", "fixed", "none"))
    num_masks: float = knob(1.0, "Mean (poisson) or number (fixed) of masks.", minimum=0.0)
    min_masks: int = knob(0, "Fewest masks (public code: 0; CM3 paper: 1).", minimum=0)
    num_sentinels: int = knob(16, "Sentinel tokens in the vocabulary = most masks per sequence.", minimum=1)
    whole_segment_probability: float = knob(0.5, "A masked sequence masks whole segments (a caption, an image) instead of spans with this probability.", minimum=0.0, maximum=1.0)
    whole_segments: str = knob("any", "Segments that are masked whole: any, or text alone (a masked caption teaches captioning, a masked image little that an unmasked one does not).", choices=("any", "text"))
    span_policy: str = knob("clip", "clip = a span over the whole sequence clipped to the segment it overlaps most (public code); segment = a segment first, then a span in it.", choices=("clip", "segment"))
    sentinel_loss_weight: float = knob(1.0, "Loss weight of predicting a sentinel (CM3 paper: 0, public code: 1).", minimum=0.0)
    retrieved_loss_weight: float = knob(1.0, "Loss weight of retrieved documents (RA-CM3: 0.1, CM3leon: 1).", minimum=0.0)
    image_loss_weight: float = knob(1.0, "Loss weight of image tokens (Emu3: 0.5).", minimum=0.0)
    first_segment_loss_weight: float = knob(1.0, "Loss weight of the first of several segments: nothing precedes it, so it teaches what captions and pictures are like, not how they belong together (CM3leon: 1; PaliGemma's prefix: 0).", minimum=0.0)


@dataclass
class StreamConfig:
    """Order, packing and batches; all of it a pure function of seed and step."""

    sequence_length: int = knob(512, "Tokens per sequence.", minimum=16)
    global_batch: int = knob(16, "Sequences per optimizer step, over all ranks.", minimum=1)
    lanes: int = knob(16, "Logical lanes; fixed for the life of a run.", minimum=1)
    lookahead: int = knob(32, "Sequences a lane may look ahead for the best fit, beyond a row.", minimum=1)
    shuffle_shards: int = knob(0, "Shards whose documents are shuffled together (0: all of them). A few of them let training read a large corpus from a store with a cache smaller than the corpus.", minimum=0)
    prefetch: int = knob(4, "Batches prepared ahead in the background.", minimum=0)
    workers: int = knob(0, "Processes per rank that prepare batches (0: a thread). Batches do not depend on it.", minimum=0)


@dataclass
class ModelConfig:
    """Decoder-only transformer; defaults are CM3leon's (sec. 2.3)."""

    family: str = knob("cm3leon", "cm3leon = LayerNorm without parameters, learned positions; llama = RMSNorm, SwiGLU, rotary positions; chameleon = llama with norms of queries and keys; dit = no decoder but the diffusion baseline, PixArt's transformer on latents (section diffusion).", choices=("cm3leon", "chameleon", "llama", "dit"))
    layers: int = knob(8, "Transformer blocks.", minimum=1)
    width: int = knob(256, "Model width.", minimum=8)
    heads: int = knob(4, "Attention heads.", minimum=1)
    kv_heads: int = knob(0, "Heads of keys and values, each shared by heads / kv_heads queries (grouped-query attention; 0: as many as heads).", minimum=0)
    ffn_width: int = knob(0, "Width of the feed-forward layer (0: 4 x width; with SwiGLU 8/3 x width, up to a multiple of 256).", minimum=0)
    activation: str = knob("relu", "Activation of the feed-forward layer (cm3leon; the other families have SwiGLU).", choices=("relu", "gelu"))
    norm_after: bool = knob(False, "Norms follow attention and feed-forward layer instead of preceding them (chameleon: the norm re-ordering of its 34B).")
    dropout: float = knob(0.0, "Dropout of the outputs of attention and feed-forward layer (Chameleon-7B: 0.1).", minimum=0.0, maximum=0.9)
    attention: str = knob("auto", "How attention is computed. auto: what is fastest here; sdpa: torch's fused kernels with a dense mask; flex, varlen: kernels that skip what documents and causality exclude (CUDA).", choices=("auto", "sdpa", "flex", "varlen"))
    weights: str | None = knob(None, "Folder of `mmtrain import`: start from these weights; new rows for tokens that they do not know.")
    max_positions: int = knob(0, "Longest sequence, and the number of learned positions (0: stream.sequence_length).", minimum=0)
    picture_grid: int = knob(0, "Learned row and column vectors for image tokens: codes along one side of a picture (-1: those of this run; 0: no vectors).", minimum=-1)
    rope_base: float = knob(10000.0, "Base of the rotary positions (llama, chameleon).", minimum=1.0)
    tie_embeddings: bool = knob(True, "Use the token embedding as the output head.")
    norm_eps: float = knob(1e-5, "Epsilon of the norms.")
    init_std: float = knob(0.006, "Standard deviation of the truncated-normal initialization (cut at 3 sigma).", minimum=0.0)
    position_init_std: float = knob(0.0002, "The same for positions, rows and columns.", minimum=0.0)
    zero_init_outputs: bool = knob(True, "Residual outputs (attention projection, second feed-forward layer) start at zero.")
    activation_checkpointing: bool = knob(False, "Recompute each block in the backward pass.")
    loss_chunk: int = knob(512, "Tokens per chunk of the output head; logits of only one chunk exist at a time. Larger: larger products, more memory.", minimum=1)
    z_loss: float = knob(0.0, "Weight of log^2 Z (Chameleon: 1e-5).", minimum=0.0)

    @property
    def rotary(self) -> bool:
        """Whether positions turn queries and keys instead of being learned vectors."""
        return self.family not in ("cm3leon", "dit")

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a third matrix, that of its gate."""
        return self.family not in ("cm3leon", "dit")

    @property
    def is_diffusion(self) -> bool:
        """Whether this is the diffusion baseline and not a decoder of tokens."""
        return self.family == "dit"

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """`kv_heads`, or as many as there are heads."""
        return self.kv_heads or self.heads

    @property
    def feed_forward_width(self) -> int:
        """`ffn_width`, or the family's own (Llama 2's rule where there is a gate)."""
        if self.ffn_width:
            return self.ffn_width
        return -(-8 * self.width // (3 * 256)) * 256 if self.gated else 4 * self.width


@dataclass
class DiffusionConfig:
    """The diffusion baseline (model=dit_...): a transformer that denoises latents of pictures, guided by their captions."""

    objective: str = knob("rectified_flow", "rectified_flow = the velocity from the picture to the noise on a straight line (Liu et al. 2022; SD3); ddpm = the noise (Ho et al. 2020).", choices=("rectified_flow", "ddpm"))
    num_train_timesteps: int = knob(1000, "Noise levels of ddpm; rectified_flow has any, on the same scale.", minimum=2)
    beta_schedule: str = knob("linear", "ddpm: how noise grows with the level (diffusers).", choices=("linear", "scaled_linear", "squaredcos_cap_v2"))
    timesteps: str = knob("uniform", "How noise levels are drawn in training: uniform, or logit_normal = mostly in the middle (SD3).", choices=("uniform", "logit_normal"))
    caption_dropout: float = knob(0.1, "Share of the captions that training replaces by the null caption, for classifier-free guidance.", minimum=0.0, maximum=1.0)
    patch_size: int = knob(1, "Cells of the latent grid per token of the transformer, along one side.", minimum=1)
    text_layers: int = knob(1, "Layers of the caption's encoder, which is trained along: bidirectional, as wide as the model.", minimum=0)
    sampler: str = knob("auto", "auto = flow_euler for rectified_flow, dpm_solver for ddpm; or ddim (ddpm).", choices=("auto", "flow_euler", "ddim", "dpm_solver"))
    sampling_steps: int = knob(25, "Steps of the sampler per picture; each computes the model once, twice with guidance.", minimum=1)
    decode: str = knob("continuous", "How latents become pixels: continuous = the decoder takes them as they are; codes = after rounding to the tokenizer's codes.", choices=("continuous", "codes"))


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    kind: str = knob("adamw", "adamw, or muon = Muon for the matrices of the blocks and AdamW for the rest, at the same learning rate (engine=ddp).", choices=("adamw", "muon"))
    lr: float = knob(1e-3, "Peak learning rate.", minimum=0.0)
    beta1: float = knob(0.9, "AdamW beta 1.", minimum=0.0, maximum=1.0)
    beta2: float = knob(0.95, "AdamW beta 2.", minimum=0.0, maximum=1.0)
    eps: float = knob(1e-8, "AdamW epsilon.")
    momentum: float = knob(0.95, "Muon momentum (Nesterov).", minimum=0.0, maximum=1.0)
    weight_decay: float = knob(0.1, "Decoupled weight decay of matrices; vectors have none.", minimum=0.0)
    clip: float = knob(1.0, "Global gradient norm limit (0: none).", minimum=0.0)
    warmup_steps: int = knob(100, "Steps of linear warm-up.", minimum=0)
    decay: str = knob("linear", "Shape of the decay after the warm-up.", choices=("linear", "cosine", "constant"))
    final_fraction: float = knob(0.1, "Learning rate at the last step as a share of the peak.", minimum=0.0, maximum=1.0)


@dataclass
class EngineConfig:
    """DeepSpeed or DDP, and how processes are started."""

    kind: str = knob("deepspeed", "Engine.", choices=("deepspeed", "ddp"))
    stage: Any = knob(1, "ZeRO stage (deepspeed), or auto = the cheapest whose estimated memory fits.", choices=("auto", 0, 1, 2, 3))
    dtype: str = knob("auto", "Parameters and activations; optimizer states and masters are float32. auto = bf16 where the devices have it (GPUs since Ampere, CPUs with AVX512_BF16 or AMX), else fp32; a run keeps what it began with.", choices=("auto", "bf16", "fp32"))
    reduce_dtype: str = knob("fp32", "In which gradients are summed over ranks (deepspeed); they are accumulated in float32 always.", choices=("fp32", "bf16"))
    offload_optimizer: bool = knob(False, "Keep masters and moments in host memory, and update there (deepspeed, stage 1 to 3).")
    offload_parameters: bool = knob(False, "Keep parameters in host memory (deepspeed, stage 3).")
    micro_batch: int = knob(0, "Sequences per rank and forward pass (0: the whole share of the rank).", minimum=0)
    ranks: int = knob(0, "Processes on this machine (0: one per GPU; without GPUs 2, or 1 on one core).", minimum=0)
    hostfile: str | None = knob(None, "DeepSpeed hostfile: train on these hosts over ssh.")
    master_port: int = knob(0, "Rendezvous port (0: a free one; several hosts: 29500).", minimum=0)
    restarts: int = knob(0, "Starts after a failure, on the hosts that answer, from the newest checkpoint.", minimum=0)
    give_up_after: int = knob(3, "Failures in a row without a new checkpoint after which no restart is tried.", minimum=1)


@dataclass
class TrainConfig:
    """Length, evaluation and checkpoints of a run."""

    steps: int = knob(1000, "Optimizer steps.", minimum=1)
    flops: float = knob(0.0, "Budget of model FLOPs (causal; the ledger's training_total): train.steps is set to the number of steps that comes nearest to it (0: off).", minimum=0.0, maximum=1e30)
    evaluate_every: int = knob(200, "Steps between validation losses (0: only at the end).", minimum=0)
    evaluate_batches: int = knob(4, "Global batches per validation.", minimum=1)
    checkpoint_every: int = knob(200, "Steps between checkpoints (one more is written at the end).", minimum=1)
    keep_checkpoints: int = knob(2, "Newest checkpoints to keep.", minimum=1)
    keep_every: int = knob(0, "Checkpoints at multiples of this step are kept for good (0: none).", minimum=0)
    async_checkpoint: bool = knob(True, "Write checkpoints behind the training that goes on (from a copy in host memory).")
    dry_run: bool = knob(True, "Before the first step do one that changes nothing, so that what cannot work fails at once.")


@dataclass
class HealthConfig:
    """What is watched while training, and what is done about it."""

    max_skipped: int = knob(10, "Updates skipped in a row, for a loss or gradient that is not finite, after which training stops.", minimum=1)
    spike: str = knob("log", "A loss far above those before it: log = say so; skip = also leave the update out; rollback = go back to the newest checkpoint and leave out the data since then.", choices=("log", "skip", "rollback"))
    spike_sigma: float = knob(6.0, "Standard deviations above the mean of the window that make a spike.", minimum=1.0)
    spike_window: int = knob(128, "Steps that the mean is taken over.", minimum=8)
    max_rollbacks: int = knob(3, "Roll-backs after which a spike stops the run.", minimum=1)
    signs: bool = knob(True, "Log the output norm of the last block, log Z, and gradients by modality (in steps that are logged).")
    straggler_factor: float = knob(1.5, "Say so when a rank takes so many times the median of all ranks for its data or its forward pass.", minimum=1.0)
    setup_seconds: float = knob(1800.0, "Most time until the first step is done; beyond it all stacks are written down and the run ends (0: never).", minimum=0.0)
    data_seconds: float = knob(600.0, "The same for waiting for a batch.", minimum=0.0)
    step_seconds: float = knob(600.0, "The same for forward, backward, or update of a step.", minimum=0.0)
    evaluate_seconds: float = knob(1800.0, "The same for a validation.", minimum=0.0)
    checkpoint_seconds: float = knob(1800.0, "The same for a checkpoint.", minimum=0.0)


@dataclass
class TrackConfig:
    """Metrics and W&B."""

    log_every: int = knob(10, "Steps between rows of metrics.jsonl and console lines.", minimum=1)
    wandb: str = knob("auto", "auto = online when a key is set, else offline.", choices=("auto", "online", "offline", "disabled"))
    project: str = knob("mmtrain", "W&B project.")
    entity: str | None = knob(None, "W&B entity.")
    tags: list[str] = knob([], "W&B tags.")
    group: str = knob("", "W&B group; a sweep sets it to its own name.")
    job_type: str = knob("train", "W&B job type.")


@dataclass
class GenerateConfig:
    """Sampling from a checkpoint."""

    task: str = knob("image", "image = text to image; caption = image to text; question = a question about a picture; infill_text = the [MASK] in a caption of a picture; infill_image = a region of a picture; interleaved = go on freely with text and pictures.", choices=("image", "caption", "question", "infill_text", "infill_image", "interleaved"))
    prompts: list[str] = knob([], "Captions, questions or texts; picture files for task=caption.")
    prompts_file: str | None = knob(None, "File with one prompt per line, or one JSON object per line with prompt, picture and seed; - is stdin.")
    pictures: list[str] = knob([], "Picture files, one per prompt or one for all (question, infill_text, infill_image).")
    region: list[int] = knob([], "infill_image: left, top, right, bottom in pixels of the square picture; widened to whole codes.")
    examples: list[str] = knob([], "Documents to place before every prompt, each PICTURE=CAPTION (a picture file and its caption), instead of retrieved ones.")
    num_samples: int = knob(4, "Samples per prompt.", minimum=1)
    best_of: int = knob(1, "Draw so many candidates per sample and keep the one that generate.scorer likes best.", minimum=1)
    scorer: str = knob("caption", "Score of a candidate: caption = log probability of the caption given the picture (image); likelihood = mean log probability of its tokens.", choices=("caption", "likelihood"))
    temperature: float = knob(1.0, "Softmax temperature (0: greedy).", minimum=0.0)
    top_k: int = knob(0, "Sample from the k most probable tokens only (0: all).", minimum=0)
    top_p: float = knob(0.95, "Nucleus sampling.", minimum=0.0, maximum=1.0)
    guidance: float = knob(3.0, "Classifier-free guidance weight of pictures (1: none).", minimum=0.0)
    guidance_schedule: str = knob("constant", "Weight over the tokens of a picture: constant; linear = from 1 up to guidance; cosine = the same along half a cosine.", choices=("constant", "linear", "cosine"))
    retrieval_guidance: float = knob(0.0, "Guidance weight of the retrieved documents against none (0: they stand in the unconditional prompt, too, as in CM3leon).", minimum=0.0)
    contrastive_k: int = knob(0, "CD-K (CM3leon sec. 3.1): score = log of conditional over unconditional probability, among tokens at least contrastive_alpha times as probable as the k-th (0: off; then guidance counts).", minimum=0)
    contrastive_alpha: float = knob(0.5, "CD-K: see contrastive_k.", minimum=0.0, maximum=1.0)
    retrieve: bool = knob(True, "Place retrieved documents before the prompt, when the run has a memory.")
    retrieve_by: str = knob("given", "Search the memory by the prompt's text, by its picture, or by what is given of the two.", choices=("given", "text", "image"))
    max_text_tokens: int = knob(64, "Longest text.", minimum=1)
    max_tokens: int = knob(0, "interleaved: most tokens to write (0: what the model's positions leave).", minimum=0)
    batch_size: int = knob(64, "Sequences sampled together.", minimum=1)
    seed: int = knob(0, "Seed; each sample has its own stream.")
    checkpoint: str = knob("latest", "latest, or the name of a folder under checkpoints/.")
    out: str | None = knob(None, "Folder for pictures (default: RUN/samples/NAME).")


@dataclass
class TaskConfig:
    """What `mmtrain evaluate` measures."""

    name: str = knob("shapes", "Task.", choices=("shapes", "curves", "loss"))
    num_documents: int = knob(500, "loss: held-out documents to measure one by one.", minimum=1)
    num_prompts: int = knob(500, "Held-out captions to draw.", minimum=1)
    num_captions: int = knob(500, "Held-out pictures to caption.", minimum=0)
    num_infills: int = knob(500, "Held-out captions with one masked word to fill in.", minimum=0)
    temperature: float = knob(1.0, "Temperature of the pictures.", minimum=0.0)
    top_p: float = knob(0.9, "Nucleus of the pictures.", minimum=0.0, maximum=1.0)
    guidance: float = knob(3.0, "Guidance of the pictures.", minimum=0.0)
    guidance_weights: list[float] = knob([1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0], "curves: guidance weights to draw with.")
    contrastive_ks: list[int] = knob([1, 2, 4, 8, 16, 32], "curves: k of CD-K to draw with.")
    contrastive_alpha: float = knob(0.5, "curves: alpha of CD-K.", minimum=0.0, maximum=1.0)


@dataclass
class SweepConfig:
    """Several runs by one command: `mmtrain train -m`, every case crossed with every value of every axis; `mmtrain sweep`, a search."""

    grid: dict[str, list[Any]] = knob({}, "Axes and their values, such as {seed:[1,2],model:[tiny,small]}; an axis on the command line (optim.lr=1e-3,3e-3) replaces that of the same name here.")
    cases: dict[str, list[str]] = knob({}, "Named sets of settings, such as {none: [retrieval=none], nearest: [retrieval=cm3leon]}; set in files.")
    parallel: int = knob(1, "Jobs side by side (0: as many as the GPUs, or cores, of this machine carry).", minimum=0)
    evaluate: list[str] = knob([], "Tasks of `mmtrain evaluate` to measure each run on after its training, such as [shapes,loss].")
    retry_failed: bool = knob(False, "Start failed jobs again, too; without it they are left alone.")
    job: int | None = knob(None, "Number of the one job of a grid to run or prepare, from 0, where something else starts the jobs, such as a Slurm array.")
    space: dict[str, Any] = knob({}, "What a search varies: settings with a list of values, or with a range such as {low:1e-4,high:1e-1,log:true} or {low:2,high:6,step:2}; set in files. What the command line says of a setting takes it out.")
    sampler: str = knob("tpe", "How a search chooses: tpe = tree-structured Parzen estimator (Bergstra et al. 2011), random, or grid = every point of the space, once.", choices=("tpe", "random", "grid"))
    trials: int = knob(20, "Trials of a search over all its workers, pruned and failed ones included (grid: all points).", minimum=1)
    metric: str = knob("val_loss", "What a search makes small: the last validation loss of a trial.", choices=("val_loss", "val_loss_text", "val_loss_image"))
    pruner: str = knob("halving", "How bad trials are ended early, on their validation losses: halving = asynchronous successive halving (Li et al. 2020), hyperband, or none.", choices=("halving", "hyperband", "none"))
    first_rung: float = knob(0.1, "Share of its steps after which a trial is compared with the others for the first time.", minimum=0.01, maximum=1.0)
    reduction: int = knob(4, "At a rung one trial of so many goes on; the next rung is so many times later.", minimum=2)
    storage: str | None = knob(None, "Where optuna keeps the study: a URL such as postgresql://HOST/NAME or mysql+pymysql://HOST/NAME, for workers on several machines (default: sqlite, study.db in the folder of the search).")


@dataclass
class PlanConfig:
    """The cluster and the data budget that `mmtrain plan` plans for; training reads none of it."""

    device: str = knob("A100", "GPU, by a name such as A100, H100-SXM, H100-PCIe, H200, B200, MI300X (those of mmtrain/flops/devices.py).")
    memory_gib: float = knob(0.0, "Memory of a GPU, in GiB (0: of the largest of its kind, such as 80 for an A100).", minimum=0.0)
    gpus_per_node: int = knob(8, "GPUs per node.", minimum=1)
    nodes: list[int] = knob([], "Numbers of nodes to compare (empty: powers of two up to 64 whose GPUs divide the global batch).")
    mfu: float = knob(0.4, "Assumed MFU, by PaLM's convention: full attention, nothing counted for recomputation.", minimum=0.001, maximum=1.0)
    run: str | None = knob(None, "Take the MFU that this run directory measured instead.")
    tokens: float = knob(0.0, "Data budget, such as 1.4e12 (0: train.steps x stream.global_batch x stream.sequence_length).", minimum=0.0)
    intra_node_gbps: float = knob(2400.0, "Gbit/s that a GPU sends to others of its node (NVLink of an A100: 2,400).", minimum=0.001)
    inter_node_gbps: float = knob(1600.0, "Gbit/s that a node sends to others, over all of its adapters.", minimum=0.001)
    storage_gbps: float = knob(80.0, "Gbit/s that the file system of the checkpoints takes, over all writers.", minimum=0.001)
    price_per_gpu_hour: float = knob(0.0, "Price of a GPU and hour, in any currency (0: no costs).", minimum=0.0)


@dataclass
class Config:
    """One run."""

    name: str = knob("run", "Name of the run; its folder is root/name.")
    seed: int = knob(0, "Seed of everything that is drawn.")
    root: str = knob("runs", "Folder of the run directories.")
    data_dir: str = knob("data", "Folder of corpora, tokenizers, shards and neighbours.")
    runner: str = knob("processes", "Where the work on corpora is done (reading, tokenizing, encoding, searching, joining): in processes of this machine, or on Ray.", choices=("processes", "ray"))
    run: str | None = knob(None, "generate, evaluate, report: the run directory to use (default: the last one trained).")
    notes: str = knob("", "Free text, kept with the run.")
    mix: dict[str, Any] = knob({}, "Corpora of the run and their shares of the tokens, such as {stamps:1,gimp_help:3}: options of the group corpus, or names under corpora. A share may change with the step: {stamps:1,gimp_help:{0:3,5000:1}}, linear in between. Empty: corpus alone.")
    corpora: dict[str, CorpusConfig] = knob({}, "Corpora that mix names, resolved; set in files only.")
    corpus: CorpusConfig = knob(CorpusConfig, "Corpus.")
    clean: CleanConfig = knob(CleanConfig, "Cleaning.")
    dedupe: DedupeConfig = knob(DedupeConfig, "Deduplication.")
    store: StoreConfig = knob(StoreConfig, "Store.")
    data: DataConfig = knob(DataConfig, "How corpora are worked through.")
    text_tokenizer: TextTokenizerConfig = knob(TextTokenizerConfig, "Text tokenizer.")
    image_tokenizer: ImageTokenizerConfig = knob(ImageTokenizerConfig, "Image tokenizer.")
    retrieval: RetrievalConfig = knob(RetrievalConfig, "Retrieval.")
    objective: ObjectiveConfig = knob(ObjectiveConfig, "Objective.")
    stream: StreamConfig = knob(StreamConfig, "Stream.")
    model: ModelConfig = knob(ModelConfig, "Model.")
    diffusion: DiffusionConfig = knob(DiffusionConfig, "Diffusion baseline.")
    optim: OptimConfig = knob(OptimConfig, "Optimizer.")
    engine: EngineConfig = knob(EngineConfig, "Engine.")
    train: TrainConfig = knob(TrainConfig, "Training.")
    health: HealthConfig = knob(HealthConfig, "Health.")
    track: TrackConfig = knob(TrackConfig, "Tracking.")
    generate: GenerateConfig = knob(GenerateConfig, "Generation.")
    task: TaskConfig = knob(TaskConfig, "Evaluation task.")
    sweep: SweepConfig = knob(SweepConfig, "Sweep.")
    plan: PlanConfig = knob(PlanConfig, "Plan.")

    @property
    def sources(self) -> dict[str, CorpusConfig]:
        """The corpora of the run by name, in the order of `mix`; `corpus` alone without a mix."""
        return {name: self.corpora[name] for name in self.mix} if self.mix else {self.corpus.name: self.corpus}
