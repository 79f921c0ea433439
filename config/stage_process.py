"""Every setting of the pipeline. Presets: config/stage_process.py:shapes (default), :sd14 and, for a small card, :sd14_10gb;
and those of the study's four arms, b2, bs, bpt and ddpo.

Override any key on the command line: --config.train.learning_rate=1e-4. Names are those of the paper's repository. What each
key may be, and whether it may change once an experiment has begun, stands in b2diffurl/configuration/keys.py.
"""

from ml_collections import ConfigDict, config_dict


def get_config(preset: str = "shapes") -> ConfigDict:
    """The locked configuration of a preset; a ValueError for a name that is not one."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    config = reference()
    PRESETS[preset](config)
    config.preset = preset
    return config.lock()


def reference() -> ConfigDict:
    """The paper's setting."""
    config = ConfigDict()

    # ---- the experiment ----
    config.preset = ""  # the name after the colon; get_config fills it in, for the report
    config.exp_name = "b2diffurl"  # names the folder under save_path and the log file
    config.run_name = "stage0"  # the stage to work on: stage<i>
    config.seed = 300  # of the whole experiment; each stage, phase and batch derives its own
    config.save_path = "model/lora"  # where experiments lie
    config.log_path = "log"  # where <exp_name>.log is written
    config.allow_config_change = False  # go on, from the next stage, with other settings than the experiment was begun with
    config.num_processes = 0  # how many processes must be at work, or none begins; 0: any number
    config.dev_id = 0  # CUDA device; without CUDA everything runs on the CPU
    config.mixed_precision = "auto"  # auto | no | fp16 | bf16; auto: bf16 or fp16 on CUDA, none on the CPU
    config.allow_tf32 = True  # TF32 matrix products on CUDA, where they are not half precision anyway
    config.compile = False  # the network by torch.compile: faster, less memory, other rounding; the first time takes minutes
    config.num_threads = 0  # CPU threads; 0: as the experiment was begun, else torch's default
    config.track_with = ()  # ("wandb",), ("tensorboard",) or both, one run an experiment; JSON lines are written in any case
    config.wandb_mode = "offline"  # offline | online; offline needs no account, and `wandb sync` uploads it later

    # ---- the schedule: backward progressive training, branch-based sampling ----
    config.stage_cnt = 100  # M, number of stages
    config.curriculum = "progressive"  # S goes L..R: progressive | reversed (R..L) | random in L..R | fixed (always L)
    config.split_step_left = 14  # L, trained steps S of the first stage
    config.split_step_right = 20  # R, trained steps of the last stage
    config.split_step = 0  # S of this call; 0: by the schedule
    config.resume_from = ""  # LoRA to start from: a .safetensors file, a checkpoint_<n> folder, a folder of those
    config.split_time = 5  # K, siblings in a group
    config.sampling = "branch"  # branch: siblings are branches of one prefix | independent: each has its own noise

    # ---- prompts ----
    config.prompt_file = "config/prompt/template1_train.json"  # .json list, .txt with a prompt a line, or .jsonl
    config.prompt = ""  # train on this one prompt instead of a file
    config.prompt_random_choose = 1  # 1: draw prompts at random; 0: go through the file in turn

    # ---- the base model ----
    config.pretrained = pretrained = ConfigDict()
    pretrained.family = "stable_diffusion"  # model adapter: stable_diffusion (1.x and 2.x)
    pretrained.model = "CompVis/stable-diffusion-v1-4"  # hub id, local directory, or a single .safetensors file
    pretrained.revision = "main"  # branch, tag or commit on the hub
    pretrained.variant = ""  # weight variant on the hub or in the directory, such as fp16
    pretrained.config = "CompVis/stable-diffusion-v1-4"  # for a single file only: configs of its family (prediction type!)
    pretrained.resolution = 0  # image size in pixels; 0: the model's own

    # ---- sampling ----
    config.sample = sample = ConfigDict()
    sample.num_steps = 20  # T, sampler steps
    sample.eta = 1.0  # DDIM's eta: 1 is fully stochastic, 0 is refused
    sample.prefix_eta = -1.0  # the same for the steps before the trained ones; -1: as sample.eta; 0: deterministic
    sample.guidance_scale = 5.0  # classifier-free guidance, in training too; 1: none
    sample.batch_size = 8  # prompts (groups) a batch; a batch holds batch_size * split_time images
    sample.num_batches_per_epoch = 32  # batches a stage, over all processes
    # Sizes that only memory limits are the most that is tried: what does not fit is halved until it does (in one process).
    sample.micro_batch_size = 0  # images the network sees at once; 0: the whole batch
    sample.decode_batch_size = 16  # latents decoded to images at once

    # ---- reward ----
    config.reward = reward = ConfigDict()
    reward.name = "clip"  # one of docs/rewards.md's, or package.module:function, your own
    reward.weights = config_dict.placeholder(object)  # a mixture instead: {"clip": 1.0, "aesthetic": 0.1}
    reward.standardise = False  # a mixture's parts in units of their deviation in the first stage, from their mean there
    reward.watch = ()  # rewards that are scored and logged and never trained on: ("pickscore",)
    reward.batch_size = 32  # images scored at once
    reward.num_workers = 4  # threads that read images ahead of the scorer
    reward.dtype = "auto"  # of scorers' models: auto | float32 | float16 | bfloat16; auto: float16 on CUDA
    reward.clip = clip = ConfigDict()
    clip.model = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # a CLIP: hub id or local directory, as are all models below
    reward.pickscore = pickscore = ConfigDict()
    pickscore.model = "yuvalkirstain/PickScore_v1"  # a CLIP trained on people's choices
    reward.aesthetic = aesthetic = ConfigDict()
    aesthetic.clip = "openai/clip-vit-large-patch14"  # whose image embeddings the head reads
    aesthetic.head = "trl-lib/ddpo-aesthetic-predictor"  # LAION's head; a .safetensors or .pth file, too
    reward.bertscore = bertscore = ConfigDict()
    bertscore.captioner = "llava-hf/llava-1.5-7b-hf"  # any model of transformers' image-text-to-text classes
    bertscore.question = "Answer concisely: what is going on in this image?"  # put to the captioner
    bertscore.max_new_tokens = 64  # of a caption
    bertscore.reference = "The image contains {prompt}"  # what a caption is compared with
    bertscore.scorer = "microsoft/deberta-xlarge-mnli"  # the text model whose token embeddings are compared
    bertscore.num_layers = 40  # the scorer's layer whose states those are; 0: the last
    reward.image_reward = image_reward = ConfigDict()
    image_reward.model = "RE-N-Y/ImageReward"  # in the format of the package imscore, as are the next two
    reward.hps_v2 = hps_v2 = ConfigDict()
    hps_v2.model = "RE-N-Y/hpsv21"  # human preference score 2.1
    reward.vqascore = vqascore = ConfigDict()
    vqascore.model = "RE-N-Y/clip-t5-xxl"  # how sure a question answerer is that the image shows the prompt
    reward.http = http = ConfigDict()
    http.url = ""  # of a reward server, http://HOST:PORT/
    http.timeout_sec = 60.0  # for one batch
    http.num_retries = 3  # of a batch, where the server is away, slow, or has an error of its own

    # ---- selection (`eval` in the paper's repository), and judging ----
    config.eval = evaluation = ConfigDict()
    evaluation.history_cnt = 8  # earlier stages whose rewards join a prompt's mean and std
    evaluation.advantage = "prompt"  # prompt | group: a reward's score is relative to its prompt's mean or to its siblings'
    evaluation.selection = "pairs"  # pairs: a group's best and worst, by the thresholds | all: every image
    evaluation.pos_threshold = 0.5  # keep a group's best sibling from this normalised score on
    evaluation.neg_threshold = -0.5  # keep a group's worst sibling below this one
    evaluation.prompt_file = "config/prompt/template1_test.json"  # held-out prompts for run_eval.py
    evaluation.judge = ""  # reward never trained on whose mean is reported as accuracy: shapes, or none
    evaluation.diversity = ("clip",)  # features whose spread in a prompt is reported: clip, layout, inception
    evaluation.inception = inception = ConfigDict()
    inception.model = "google/vit-base-patch16-224"  # the classifier of diversity's Inception Score
    evaluation.num_images = 256  # images a prompt file is judged by
    evaluation.batch_size = 32  # images generated at once
    evaluation.seed = 0  # of the evaluation noise, the same for every experiment and checkpoint
    evaluation.every = 10  # stages from one evaluation on held-out prompts to the next while a run goes on; 0: none
    evaluation.deployed = deployed = ConfigDict()  # the sampler people use the tuned model with, judged beside training's
    deployed.scheduler = "DDIMScheduler"  # any of diffusers, such as DPMSolverMultistepScheduler
    deployed.num_steps = 50  # its steps
    deployed.eta = 0.0  # of schedulers that have one; 0 is deterministic
    deployed.guidance_scale = 0.0  # 0: as in training

    # ---- training ----
    config.train = train = ConfigDict()
    train.objective = "ddpo"  # ddpo | reinforce (no clipping, one epoch) | dpok (ddpo, KL to the base) | d3po (DPO, pairs)
    train.num_epochs = 2  # passes over a stage's selection
    train.batch_size = 2  # batch_size * gradient_accumulation_steps trajectories, each with
    train.gradient_accumulation_steps = 64  # all its S steps, make one update
    train.micro_batch_size = 16  # transitions the network sees at once; memory and speed, not the result
    train.gradient_checkpointing = False  # activations are computed twice instead of kept: slower, less memory, same result
    train.timestep_fraction = 1.0  # of a trajectory's S steps, how many an update takes, drawn anew each time
    train.unconditional_gradient = True  # False: none through guidance's unconditional half; faster, another gradient
    train.learning_rate = 1e-4  # AdamW's
    train.adam_beta1 = 0.9  # AdamW's
    train.adam_beta2 = 0.999  # AdamW's
    train.adam_weight_decay = 1e-4  # AdamW's
    train.adam_epsilon = 1e-8  # AdamW's
    train.use_8bit_adam = False  # AdamW of bitsandbytes, if that is installed
    train.max_grad_norm = 1.0  # gradient norm is clipped to this
    train.eps = 0.1  # PPO's clip range of the ratio of (mean) likelihoods; see docs/method.md before lowering it
    train.kl_weight = 0.1  # dpok: advantages a nat of KL to the base costs, both as means over the D latent dimensions
    train.dpo_beta = 0.1  # d3po: beta of mean log-ratios, D times that of joint ones; D3PO's at D = 16,384
    train.beta1 = 1.0  # weight of positive advantages
    train.beta2 = 1.0  # weight of negative advantages
    train.adv_clip_max = 5.0  # advantages are clamped to +- this
    train.step_weight = "none"  # none | leverage | sigma: weigh each step by 1 / its leverage, or by its noise
    train.lora_rank = 4  # LoRA rank; alpha always equals it
    train.save_interval = 2  # epochs between checkpoints; the last epoch is always saved

    # ---- what stays on disk ----
    config.keep = keep = ConfigDict()
    keep.samples = False  # keep trajectories: those not selected after the selection, the others after the training
    keep.images = -1  # images kept a stage after its training; -1: all
    return config


def sd14(config: ConfigDict) -> None:
    """Stable Diffusion v1.4 with the reference budget: 100 stages of 1,280 images, 128,000 in all. One CUDA GPU."""


def sd14_10gb(config: ConfigDict) -> None:
    """The same on a card of 10 GB: the same update, up to rounding, in small pieces and with activations recomputed.

    Its peak has not been measured on a card yet (docs/performance.md).
    """
    config.sample.micro_batch_size = 8
    config.sample.decode_batch_size = 2
    config.reward.batch_size = 8
    config.train.micro_batch_size = 2
    config.train.gradient_checkpointing = True


def shapes(config: ConfigDict) -> None:
    """The embedded model on two CPU cores: 8 stages of 3,200 images, 25,600 in all, in 16 to 35 minutes.

    Accuracy on training prompts from 55 to 91 %, on held-out prompts from 52 to 84 % (means of three seeds).
    """
    config.exp_name = "shapes"
    config.seed = 3  # one of the three that docs/results.md reports
    config.pretrained.model = "model/shapes/base"
    config.reward.clip.model = "model/shapes/clip"
    config.reward.batch_size = 256
    config.prompt_file = "config/prompt/shapes_relation_train.json"
    config.eval.prompt_file = "config/prompt/shapes_relation_test.json"
    config.eval.judge = "shapes"
    config.eval.diversity = ("clip", "layout")
    config.eval.num_images = 512
    config.eval.batch_size = 64
    config.eval.every = 2
    config.eval.deployed.num_steps = 20
    config.stage_cnt = 8
    config.split_step_left = 9  # a relation is decided in the first two steps
    config.split_step_right = 10
    config.sample.num_steps = 10
    config.sample.guidance_scale = 2.0  # the base's best at 10 steps
    config.sample.batch_size = 32
    config.sample.num_batches_per_epoch = 20
    config.sample.micro_batch_size = 64
    config.sample.decode_batch_size = 32
    config.train.num_epochs = 1
    config.train.save_interval = 1
    config.train.batch_size = 64
    config.train.gradient_accumulation_steps = 1
    config.train.micro_batch_size = 32
    config.train.learning_rate = 2e-3
    config.train.eps = 0.01  # D * c = 2.6 at D = 256; 0.1 never binds, and a longer run collapses
    config.train.dpo_beta = 256.0  # at D = 256, 1 on joint log-ratios; at a tenth of it runs fell apart
    config.train.lora_rank = 16
    config.train.step_weight = "sigma"
    config.keep.images = 64


def b2(config: ConfigDict) -> None:
    """B2-DiffuRL in the study (docs/results.md): 9 stages of 640 images, 5,760 in all, in about 3 minutes on one core.

    In 8 steps and without guidance, for which an image costs two fifths of the default's.
    """
    shapes(config)
    config.exp_name = "b2"
    config.stage_cnt = 9
    config.split_step_left = 6  # of 8: the reference's 14 of 20
    config.split_step_right = 8
    config.sample.num_steps = 8
    config.sample.guidance_scale = 1.0
    config.sample.num_batches_per_epoch = 4
    config.train.batch_size = 16
    config.eval.num_images = 384
    config.eval.every = 0
    config.keep.images = 0


def bs(config: ConfigDict) -> None:
    """The study's branch-based sampling alone, in about 2 minutes: S stays L."""
    b2(config)
    config.exp_name = "bs"
    config.curriculum = "fixed"


def bpt(config: ConfigDict) -> None:
    """The study's progressive training alone, in about 3 minutes: siblings share a prompt, not a prefix."""
    b2(config)
    config.exp_name = "bpt"
    config.sampling = "independent"


def ddpo(config: ConfigDict) -> None:
    """The study's plain DDPO, in about 5 minutes: independent images, all T steps, every image with its advantage."""
    b2(config)
    config.exp_name = "ddpo"
    config.sampling = "independent"
    config.curriculum = "fixed"
    config.split_step_left = config.sample.num_steps
    config.eval.selection = "all"


PRESETS = {"shapes": shapes, "sd14": sd14, "sd14_10gb": sd14_10gb, "b2": b2, "bs": bs, "bpt": bpt, "ddpo": ddpo}
