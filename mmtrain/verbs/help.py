"""What each verb does, in one line and in one page. Plain text, so that `--help` needs no other import."""

VERBS: dict[str, str] = {
    "ls": "list experiments, models, corpora and every other choice",
    "data": "read a corpus, tokenize it, write, verify and look at shards",
    "tokenizer": "train the text or the image tokenizer",
    "retrieval": "find the neighbours of every document",
    "train": "train a run, or go on with it; prepares what is missing",
    "sweep": "search settings, climb a ladder of sizes, write a W&B sweep",
    "generate": "draw and caption pictures, answer questions, fill gaps",
    "evaluate": "measure a run on held-out data",
    "export": "write a run as a Hugging Face folder",
    "import": "read a Hugging Face folder of OPT, Llama or Chameleon, to train from it",
    "flops": "compute of published models, of a configuration, of a run",
    "plan": "memory, time, communication and cost of a run on a cluster, before it",
    "report": "write report.html of a run",
    "runs": "list, show, compare and watch runs",
    "sync": "bring to W&B what it does not have of runs",
    "checkpoint": "list, verify, prune and compare the checkpoints of a run",
    "doctor": "check this machine and say how to mend what is wrong",
}

CONFIGURED = (
    *("data", "tokenizer", "retrieval", "train", "sweep", "generate", "evaluate", "flops", "plan", "report", "doctor"),
)
"""Verbs that take KEY=VALUE, and so `--cfg job`."""

OF_A_RUN = ("generate", "evaluate", "report")
"""Verbs that start from the frozen configuration of a run."""

_SETTINGS = """\
Settings are KEY=VALUE or GROUP=OPTION, the later wins: `mmtrain ls` lists the options,
docs/reference/config.md every key. Options that every verb understands:
  --cfg job         print the resolved configuration and stop
  --config-dir DIR  a folder of your own options, laid out like conf/ (experiment/mine.yaml, ...)
"""

HELP: dict[str, str] = {
    "ls": """\
mmtrain ls [GROUP]

Lists what can be chosen, with one line each: whole runs (experiment=...) and parts of a run (model=...,
corpus=...). A name is used as GROUP=NAME with the other verbs.

Example
  mmtrain ls                 every group
  mmtrain ls experiment      whole runs only
  mmtrain ls --config-dir my_conf experiment     your own among them
""",
    "data": """\
mmtrain data [build|tokenize|verify] [settings]
mmtrain data inspect [ID|NUMBER|SPLIT:NUMBER ...] [full] [settings]
mmtrain data stats [json] [settings]
mmtrain data browse [HOW_MANY] [ID|SPLIT:NUMBER ...] [FILE.html] [settings]

build     reads the corpus, cleans it, drops copies, keeps near-duplicates on one side of the split, and writes
          document shards; says how much was left out, and why.
tokenize  trains the tokenizers that are missing, and writes token shards. Without a word: build and tokenize.
verify    compares every byte of what was built of the corpus with what was written; names every bad file;
          exit code 1 if there is one.
inspect   prints documents: texts, pictures, tokens, and where they lie in which tar.
stats     counts documents, pictures, tokens, lengths, near-duplicates and what was left out.
browse    writes one HTML page of documents drawn at random: reading order, tokens, every picture beside what its
          tokens decode to, near-duplicates, neighbours.

Shards are tar files that plain webdataset reads, with an index and a manifest. The work is done in partitions by
data.processes processes: stopped or killed, the same command goes on, and what it writes depends neither on that
nor on the number of processes. What exists already is reused; another setting makes another folder under data_dir.

Example: your own pictures, with a caption in IMAGE.txt beside each IMAGE.jpg
  mmtrain data corpus=pairs corpus.name=holiday corpus.path=pictures/holiday corpus.image_size=64

Example: tars that img2dataset wrote
  mmtrain data corpus=img2dataset corpus.name=web corpus.path=/data/web

Example: interleaved pages of a manual, fetched by apt-get; then a look at 50 of them
  mmtrain data corpus=gimp_help
  mmtrain data browse 50 corpus=gimp_help

Example: two corpora that a run mixes, and their statistics
  mmtrain data stats 'mix={stamps:1,gimp_help:3}'
""",
    "tokenizer": """\
mmtrain tokenizer text|image [settings]

text   trains a byte-level BPE on the captions of the corpus (text_tokenizer.vocab_size entries).
image  trains an autoencoder that turns a picture into (image_size / downsample)^2 codes; prints PSNR, SSIM,
       codebook use and perplexity on held-out pictures and writes reconstructions.png.
`mmtrain train` does both when they are missing; this verb is for trying settings.

Example
  mmtrain tokenizer image corpus=stamps image_tokenizer=fsq image_tokenizer.steps=3000
  mmtrain tokenizer text corpus=stamps corpus.languages=[en,de] text_tokenizer.vocab_size=2048

Use one that you have
  mmtrain train text_tokenizer.path=tokenizer.json image_tokenizer.path=data/stamps/image-0123456789ab
""",
    "retrieval": """\
mmtrain retrieval [settings]
mmtrain retrieval train-encoder [settings]
mmtrain retrieval join [settings]
mmtrain retrieval inspect [HOW_MANY] [FILE.html] [settings]

Finds, for every document, candidates among the training documents: by its text (of which retrieval.query_dropout
of the words are left out) and by its pictures, retrieval.num_candidates of each. A document's vector is the mean of
its text and picture vectors; a document of several pictures is searched window by window. Never a candidate: the
document itself, its near-duplicate cluster, the same picture, a cosine above retrieval.max_score, what is that near
to another candidate, and what is in an evaluation set of retrieval.block. Training draws among the candidates and
places them in front of the document (retrieval.policy, num_documents, dropout, order, max_tokens; all decided when a
document is read, as a pure function of the seed). Prints what was left out, and why, and a few neighbours to look at.

train-encoder  trains the small encoder of retrieval=dual on the captions and pictures of the training split, and says
       how often it finds the picture of a held-out caption; retrieval=dual does so by itself where it is missing.
join   writes the tokens of the candidates beside each document (inlined shards), for training that streams from an
       object store; with retrieval.inlined=true, or corpus.retrieved=URL beside corpus.tokens=URL, the batches are
       the same as by look-up.
inspect  writes an HTML page of held-out documents (40, drawn by the seed) with what their text and their pictures
       found, the cosines, and why some of it was passed over.

The work is done in partitions; stopped or killed, the same command goes on.

Example
  mmtrain retrieval corpus=stamps retrieval.num_candidates=16 retrieval.max_score=0.95
  mmtrain retrieval corpus=stamps retrieval=cm3leon          three documents of 2 by text and 2 by picture
  mmtrain retrieval train-encoder corpus=stamps
  mmtrain retrieval join corpus=stamps
  mmtrain retrieval inspect 100 corpus=stamps
""",
    "train": """\
mmtrain train [settings]
mmtrain train -m KEY=VALUE,VALUE ... [settings]
mmtrain train prepare [settings]

Prepares what is missing (corpus, tokenizers, shards, neighbours) and trains on DeepSpeed: on every GPU of
this machine, or on 2 CPU processes where there is none. The run directory is root/name, runs/NAME by
default: config.yaml, metrics.jsonl, checkpoints/, samples/, ledger.json. Ctrl-C, SIGTERM, SIGUSR1 or a file RUN/stop
finish the step, save, and end with exit code 0; a second Ctrl-C ends at once. A crash loses at most
train.checkpoint_every steps. The same command goes on from the newest checkpoint; engine.restarts=N does so by
itself, on the hosts that still answer. Exit code 1: training failed; 2: a mistake that you can mend.

prepare   stops before training; its last line is the run directory, for torchrun, Slurm or Kubernetes to train:
          torchrun --nproc_per_node 2 -m mmtrain.train.worker --run-dir runs/quickstart

-m, --multirun   a run for each combination of values (a,b  range(0,4)  glob(llama*)), and of sweep.grid and
          sweep.cases of the experiment, in root/name: all are checked first; one that fails stops no other; the
          same command runs only what is missing. sweep.parallel runs side by side, sweep.evaluate measures;
          sweep.job=N chooses one job (sbatch --array=0-3 launch/slurm.sbatch -m ...).
train.flops=N    a budget in FLOPs in place of train.steps.

Example: minutes on a laptop, on real captioned pictures
  mmtrain train experiment=quickstart

Example: a model and a name of your own
  mmtrain train name=wide corpus=shapes model=small model.width=384 optim.lr=5e-4 train.steps=3000

Example: the diffusion baseline, on the same pictures in the same order as experiment=shapes_cpu
  mmtrain train experiment=diffusion_baseline

Example: four processes with ZeRO 3; the hosts of a file, going on without those that are lost
  mmtrain train experiment=quickstart engine=zero3 engine.ranks=4
  mmtrain train experiment=cm3leon_350m corpus.path=/data/pairs engine.hostfile=hosts.txt engine.restarts=20
""",
    "sweep": """\
mmtrain sweep sweep=NAME [settings]
mmtrain sweep ladder [settings]
mmtrain sweep wandb sweep=NAME [out=FILE] [settings]

Searches the settings of sweep.space (an option of the group sweep, or a section of an experiment): sweep.trials
trials of `mmtrain train`, chosen by sweep.sampler (tpe, random, grid), bad ones ended early by sweep.pruner on their
validation losses. All in root/name, by default runs/NAME: study.db, search.json with the FLOPs spent and saved,
experiment/best.yaml with the best settings, a run directory per trial. The same command in another terminal is a
second worker; on several machines with sweep.storage=URL. Stopped or killed, it goes on: no trial is run twice. Every
value and both ends of every range are checked before the first trial starts. Needs the extra `search` (optuna).

ladder  sizes (sweep.cases) x budgets in FLOPs (sweep.grid) as of `mmtrain train -m`; then
        `mmtrain report scaling runs/ladder` fits L(N, D) and names the compute-optimal size.
wandb   writes the same search as the file of a W&B sweep; `wandb agent` runs `mmtrain train` for each trial.

Example
  mmtrain sweep sweep=lr_search experiment=shapes_tiny
  mmtrain sweep ladder experiment=shapes_tiny sweep.parallel=2
  mmtrain sweep wandb sweep=lr_search experiment=shapes_tiny
""",
    "generate": """\
mmtrain generate [PROMPT ...] [settings]

Samples from a checkpoint. Prompts are words, lines of generate.prompts_file=FILE (- is stdin), or the list
generate.prompts; without any it takes the first held-out documents. The run is the last one that was
trained, or the one of run=FOLDER, name=NAME or experiment=NAME. generate.task says what is made:
  image          a picture for each caption (the default)
  caption        a caption for each picture file
  question       an answer to each question about generate.pictures
  infill_text    the words for every [MASK], with or without generate.pictures
  infill_image   generate.region of generate.pictures drawn anew; the prompt is its caption, if any
  interleaved    text and pictures that go on from each prompt, as Markdown
Pictures, a grid, and samples.json (prompt, seed, settings, fingerprints, scores) go to a folder of their own
below RUN/samples; the same command writes the same bytes.

Example: pictures for two captions; the best of four candidates each
  mmtrain generate "a red circle" "two blue squares" generate.num_samples=2 generate.best_of=4

Example: captions for pictures; a question about one
  mmtrain generate generate.task=caption cat.png dog.jpg run=runs/quickstart
  mmtrain generate generate.task=question "What is on the table?" generate.pictures=[table.jpg]
""",
    "evaluate": """\
mmtrain evaluate [task=shapes|curves|loss] [settings]

Measures a run on held-out data, prints the numbers (shares with 95 % confidence intervals) and keeps them in
RUN/evaluation-TASK.json. The run is chosen as with `mmtrain generate`.
  task=loss    validation loss by modality, and losses of held-out documents one by one with nothing masked, of which
               retrieved tokens do not count; for every corpus
  task=shapes  draws held-out captions and grades the pictures pixel by pixel; captions held-out pictures; fills in
               one masked word of each caption
  task=curves  draws with several guidance weights and with CD-K; writes the curves as RUN/curves.svg

Example
  mmtrain evaluate task=shapes run=runs/shapes_cpu task.num_prompts=500
""",
    "flops": """\
mmtrain flops ls | show NAME
mmtrain flops count [MODEL] [settings]
mmtrain flops count NETWORK [resolution=PIXELS] [text_tokens=NUMBER]
mmtrain flops compare RUN [RUN ...]
mmtrain flops run=FOLDER [run=FOLDER ...]

ls       training compute of published models, with the convention that was used and how it was checked
show     one of them, every number with its source, and the MFU that its published hours imply
count    parameters and FLOPs per token of one of our models, by module (forward, backward, recomputed) and by
         convention; or of a diffusion network (sd15, sd21, sdxl, sd3_medium, sd3_8b, dit_xl2, pixart_alpha,
         sana_1600m, flux_dev, ...), counted from its architecture without weights, VAE and text encoders apart
         (needs the extra `diffusion`)
compare  runs beside published models: convention, ratio, A100-hours at 40 % MFU, published hours and what they imply
run      the books of a run, audited: what was spent on what, in which segment, what was lost in crashes, and the
         compute of the model it started from. Exit code 1 when something does not add up. Several runs, or a folder
         of runs: a line each and the sum, in which what they share counts once

1 multiply-add = 2 FLOPs. Conventions: model FLOPs (causal, document-masked), PaLM (full attention), hardware (with
recomputation). Papers on diffusion print multiply-adds as "Gflops": half of these numbers. An undisclosed number
stays undisclosed. docs/explanation/compute.md explains all of it, and the claim of "5x less compute".

Example
  mmtrain flops show cm3leon-7b
  mmtrain flops count cm3leon_7b stream.sequence_length=4096
  mmtrain flops count sdxl resolution=512
  mmtrain flops compare runs/quickstart
  mmtrain flops run=runs/quickstart
""",
    "plan": """\
mmtrain plan [--json] [settings]

What a run would need and take on a cluster, by ZeRO stage and number of nodes: parameters, memory of a GPU by what
takes it, what fits, FLOPs by convention, tokens per second and days at an assumed MFU, bytes that each GPU sends and
their time, checkpoints, cost; and which it recommends, and why. Trains nothing, needs no data and no GPU.

Settings are those of `mmtrain train`; the section plan describes the cluster: plan.device, plan.memory_gib,
plan.gpus_per_node, plan.nodes, plan.inter_node_gbps, plan.intra_node_gbps, plan.storage_gbps, plan.price_per_gpu_hour;
the budget (plan.tokens, else that of the run); and plan.mfu, or plan.run=FOLDER for what a run measured. Times are
ranges: communication hidden behind computing as far as it can be, and not at all. With engine.micro_batch=0 the
largest that fits is taken. Exit code 2: nothing fits; the sentence says what would need less. --json prints the same
as JSON, in bytes, seconds and FLOPs.

Example: CM3leon-7B on 2.4 T tokens, on up to 64 A100s
  mmtrain plan experiment=cm3leon_350m model=cm3leon_7b corpus.path=/data/pairs plan.tokens=2.4e12 plan.nodes=[1,2,4,8]

Example: your own GPUs, with 40 GiB, 4 in a node, behind 200 Gbit/s, at a price
  mmtrain plan corpus=shapes model=cm3leon_1b stream.global_batch=64 plan.memory_gib=40 plan.gpus_per_node=4 \
      plan.inter_node_gbps=200 plan.price_per_gpu_hour=1.5
""",
    "report": """\
mmtrain report [run=FOLDER]
mmtrain report ablation sweep=FOLDER [baseline=ARM]
mmtrain report compare RUN... | SWEEP_FOLDER [out=FOLDER]
mmtrain report scaling SWEEP_FOLDER [flops=NUMBER] [out=FOLDER]

Writes report.html into the run directory: one file, no network needed. What was trained on what, loss
curves, reconstructions, neighbours, generated pictures beside the truth, the compute ledger beside
published models, and the commands that reproduce it. The run is chosen as with `mmtrain generate`.

ablation  compares the arms of a sweep that was measured with task=loss (and shapes): losses of held-out documents by
          modality, attribute accuracy, means over seeds and paired differences from the baseline (default: the first
          case) with 95 % intervals, by a bootstrap over seeds and documents; FOLDER/ablation.json and ablation.png.
compare   reads the ledgers and evaluations (task=shapes) of many runs, token models and diffusion models of any sizes,
          budgets and seeds, and writes comparison.html, comparison.json and pictures: quality against training FLOPs
          with intervals, which family is ahead at which budget, where the curves cross, both beside published models.
scaling   fits L(N, D) = E + A / N^alpha + B / D^beta to the runs of a ladder (Hoffmann et al. 2022, approach 3), all
          tokens and each modality, with bootstrap intervals; predicts the runs of the largest budget from the others;
          names the compute-optimal size for flops=NUMBER; writes scaling.json and scaling.png. Needs scipy
          (extra `search`).

Example
  mmtrain report run=runs/quickstart
  mmtrain report ablation sweep=runs/ablate_retrieval baseline=none
  mmtrain report compare runs/iso_flop
  mmtrain report scaling runs/ladder flops=1e13
""",
    "runs": """\
mmtrain runs ls [PATTERN ...] [--json] [root=DIR]
mmtrain runs show [RUN] [--json] [root=DIR]
mmtrain runs compare RUN RUN ... | SWEEP_FOLDER [out=FILE.html] [root=DIR]
mmtrain runs watch [RUN] [every=SECONDS] [root=DIR]

ls       a line for each run under root=DIR (runs), jobs of sweeps included: state, step, tokens, losses of training and
         validation, MFU (model FLOPs, causal), training FLOPs, last checkpoint, age of the last row.
show     one run: settings that differ from its experiment's, losses by modality, the compute ledger, goodput,
         checkpoints, W&B, and where everything is.
compare  writes one HTML page: settings that differ, then curves of validation and training loss, by modality, over
         tokens and over training FLOPs. SWEEP_FOLDER: all of its jobs.
watch    follows a run until it ends (on a terminal: in place); Ctrl-C ends the watching, not the run. Exit code 0 when
         it finished or was stopped, 1 when it failed.

States: waiting (not started), running, stalled (its last row is five times as old as its longest pause between rows
before, and a minute at least), finished, stopped (asked to), failed (also: killed), unknown. A RUN is a folder, a name
under root, or the name of a job; without one, the last that was trained. Nothing is written but the page.

Example
  mmtrain runs ls 'lr_grid/*'
  mmtrain runs show quickstart
  mmtrain runs compare runs/lr_grid
  mmtrain runs watch quickstart
""",
    "checkpoint": """\
mmtrain checkpoint [ls | verify [CHECKPOINT ...] | prune keep=N [dry] | diff A B] [run=FOLDER|name=NAME]

ls      lists the checkpoints of a run: step, time, size, ranks that wrote it, kept for good, complete.
verify  compares every byte with what was written, names every bad file; exit code 1 if there is one.
prune   removes all but the newest N, says what it frees; dry: only says so. What train.keep_every keeps for good
        stays, and the newest that is sound, and what is damaged.
diff    compares two checkpoints, whatever engine, ZeRO stage and number of ranks wrote them: what differs in the
        state, the largest differences by kind of tensor, the worst parameters; exit code 0 when all is equal bit for
        bit, 1 when not.

A CHECKPOINT is a step, the name of a folder under checkpoints/, or any path. The run is chosen as with
`mmtrain generate`.

Example
  mmtrain checkpoint ls run=runs/quickstart
  mmtrain checkpoint diff 200 runs/other/checkpoints/step-00000200 run=runs/quickstart
""",
    "sync": """\
mmtrain sync [FOLDER ...]

Sends W&B what it does not have of a run: rows of metrics.jsonl, samples, checkpoints as references. A FOLDER is a run
directory, or holds some (a sweep, root); without one: runs. What W&B already has is W&B's own word, so rows arrive
once and in order, however often training or this command was killed; RUN/wandb/synced.json says what has arrived.
All starts of a run are one run on W&B. Exit code 2: W&B cannot be reached, or refuses the key; nothing is lost.

Example
  mmtrain sync runs/quickstart
  WANDB_API_KEY=... mmtrain sync
""",
    "export": """\
mmtrain export out=FOLDER [run=FOLDER|name=NAME] [dtype=float32|bf16] [shard_bytes=5000000000] [settings]

Writes the newest checkpoint of a run as a folder that transformers opens: a cm3leon model as OPT, llama as
Llama, chameleon as Chameleon. Weights are safetensors, in files of at most shard_bytes; beside them the
tokenizer over all ids of the run, its image tokenizer and a model card. The run is chosen as with
`mmtrain generate`. What transformers cannot compute is refused before anything is written.

Example
  mmtrain export run=runs/quickstart out=quickstart-hf dtype=bf16
""",
    "import": """\
mmtrain import SOURCE out=FOLDER [shard_bytes=5000000000] [baseline=ID]

Reads a Hugging Face folder (safetensors, config.json, tokenizer.json) of OPT without biases and parameters
of norms, of Llama, or of Chameleon, and writes a weights folder. Every token keeps its row; image codes and
masks that the model does not know get rows when a run starts from it. Pickled weights are never opened.
baseline=ID names the model in `mmtrain flops ls`, so that the lineage of a run knows what its weights cost.

Example: tune Llama 2 on pictures of your own
  mmtrain import Llama-2-7b-hf out=weights/llama2
  mmtrain train model.weights=weights/llama2 corpus=pairs corpus.path=pictures/holiday
""",
    "doctor": """\
mmtrain doctor [--json] [settings]

Checks versions (also those that are known to be bad together), devices, memory, limits, /dev/shm, disks and that files
there survive a rename, apt-get, DeepSpeed, network interfaces and InfiniBand, the port, W&B and its key. With the
settings of a run: whether its checkpoints fit on the disk, one decoded document of each corpus that is built, the
vocabulary of token shards against the model, and a small all-reduce with a time limit over all ranks: of this machine,
or of every host of engine.hostfile. Says of each whether it is well and, where not, how to mend it. Exit code 0: well,
or warnings only; 1: something fails.

Example
  mmtrain doctor
  mmtrain doctor --json root=/scratch/runs
  mmtrain doctor experiment=cm3leon_350m corpus.path=/data/pairs engine.hostfile=hosts.txt
""",
}
for _verb in CONFIGURED:
    HELP[_verb] += "\n" + _SETTINGS
