"""Every setting, with its default. A preset is chosen as config/stage_process.py:NAME, or Preset=NAME bash run_process.sh:

    shapes                the default: a small model on two CPU cores, with the objective nft
    shapes_flow           a small flow-matching model, with the same objective
    shapes_ddpo           the small model with the paper's objective
    sd14_nft              Stable Diffusion v1.4 with the objective nft
    sd14, sd14_10gb       Stable Diffusion v1.4 with the paper's settings, and the same for a GPU of 10 GB
    sdxl, sdxl_24gb       SDXL with the objective nft, and the same for a GPU of 24 GB
    sd35, sd35_24gb       Stable Diffusion 3.5 medium with the objective nft, and the same for a GPU of 24 GB
    flux                  FLUX.1-dev with the objective nft
    b2, bs, bpt, ddpo     four arms of the study (docs/results.md), and b2_nft, the one that learns most

Override any key on the command line: --config.train.learning_rate=1e-4. The names that the paper's repository has for keys
work everywhere; where another name is clearer here, they mean the same (docs/configuration.md).
b2diffurl/configuration/keys.py has the allowed values of each key, and whether it may change once an experiment has begun.
"""

from difflib import get_close_matches

from ml_collections import ConfigDict, config_dict


def get_config(preset: str = "shapes") -> ConfigDict:
    """The configuration of a preset, locked against new keys; a ValueError lists the presets if the name is unknown."""
    if preset not in PRESETS:
        near = "".join(f"; did you mean {name}?" for name in get_close_matches(preset, PRESETS, n=1))
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}{near}")
    config = reference()
    PRESETS[preset](config)
    config.preset = preset
    return config.lock()


def reference() -> ConfigDict:
    """All keys with the paper's values. Presets change some of them."""
    config = ConfigDict()

    # ---- the experiment ----
    config.preset = ""  # name of the preset; get_config fills it in
    config.exp_name = "b2diffurl"  # names the folder under save_path and the log file
    config.run_name = "stage0"  # the stage that a single script works on: stage0, stage1, …; run_process.sh sets it
    config.seed = 300  # of the whole experiment; each stage, phase and batch derives its own seed from it
    config.save_path = "model/lora"  # folder of all experiments
    config.log_path = "log"  # folder of the log, <exp_name>.log
    config.allow_config_change = False  # True: from the next stage on, accept other settings than the experiment began with
    config.num_processes = 0  # refuse to start unless exactly so many processes run; 0: any number
    config.dev_id = 0  # CUDA device; without CUDA everything runs on the CPU
    config.mixed_precision = "auto"  # auto | no | fp16 | bf16; auto: bf16 on CUDA (fp16 on older GPUs), no on the CPU
    config.allow_tf32 = True  # float32 matrix products on CUDA in TF32: faster, less precise
    config.compile = False  # True: torch.compile the network. Faster, less memory, other rounding; compiling takes minutes
    config.num_threads = 0  # CPU threads; 0: the number the experiment was begun with, in a new one torch's default
    config.track_with = ()  # trackers: ("wandb",), ("tensorboard",) or both; metrics/*.jsonl are always written
    config.wandb_mode = "offline"  # offline | online; offline needs no account, and `wandb sync` uploads the run later

    # ---- the schedule: backward progressive training, branch-based sampling ----
    config.stage_cnt = 100  # M, number of stages
    config.curriculum = "progressive"  # progressive | reversed | random | fixed | early | sliding (docs/method.md)
    config.split_step_left = 14  # L, number S of trained steps in the first stage
    config.split_step_right = 20  # R, number S of trained steps in the last stage; fixed and sliding keep to L
    config.split_step = 0  # S of a single call, instead of the curriculum's; 0: by the curriculum
    config.split_stop = 0  # step, counted from the noise, at which the trained ones end; 0: the last. Not early, not sliding
    config.resume_from = ""  # LoRA to start from: a .safetensors file, a checkpoint_<n> folder, or a folder of these
    config.split_time = 5  # K, images in a group (siblings)
    config.split_times = ()  # a tree instead: branches of a state at each parting, (2, 3) for 6 images; (): one parting
    config.split_after = ()  # trained steps from one parting of the tree to the next, one number fewer than split_times
    config.sampling = "branch"  # branch: siblings share the steps before the trained ones | independent: only the prompt

    # ---- prompts ----
    config.prompt_file = "config/prompt/template1_train.json"  # a .json list, .txt with a prompt a line, or .jsonl
    config.prompt = ""  # train on this single prompt instead of the file; "": use the file
    config.prompt_random_choose = 1  # 1: draw prompts at random; 0: take them in the order of the file

    # ---- sections, each in its own function below ----
    config.pretrained = base_model()
    config.sample = sampling()
    config.reward = rewards()
    config.selection = selection()
    config.eval = judging()
    config.train = training()
    config.keep = kept_files()
    share_older_names(config)
    return config


def base_model() -> ConfigDict:
    """The base model."""
    pretrained = ConfigDict()
    pretrained.family = "auto"  # stable_diffusion (1.x, 2.x), sdxl, sd3, flux, flux2; auto: recognised by the model's files
    pretrained.model = "CompVis/stable-diffusion-v1-4"  # hub id, local directory, or a single .safetensors file
    pretrained.revision = "main"  # branch, tag or commit of the model on the hub
    pretrained.variant = ""  # variant of the weight files, such as fp16; "": the plain ones
    pretrained.config = ""  # for a single file: a model whose configs fit (prediction type!); "": the family's first
    pretrained.resolution = 0  # height and width of images in pixels; 0: the model's own
    pretrained.scheduler = config_dict.placeholder(object)  # entries for its scheduler: {"timestep_spacing": "leading"}
    pretrained.max_sequence_length = -1  # SD3, FLUX: text tokens of T5 or Qwen, fewer are faster; -1: as many as diffusers
    pretrained.offload = False  # True: text encoders are on the GPU only while they encode. Less memory, the same images
    return pretrained


def sampling() -> ConfigDict:
    """Sampling a stage's images."""
    sample = ConfigDict()
    sample.num_steps = 20  # T, sampler steps
    sample.eta = 1.0  # noise of the steps: 1 is fully stochastic; 0 is deterministic, which only nft and awm can train
    sample.sde = "cps"  # flow matching: kind of stochastic steps, cps | flow | dance (docs/method.md). Others: always DDIM
    sample.prefix_eta = -1.0  # eta of the steps before the trained ones; -1: as sample.eta; 0: deterministic
    sample.suffix_eta = -1.0  # eta of the steps after the trained ones; -1: as sample.eta; 0: deterministic
    sample.suffix_steps = 0  # with suffix_eta 0: take at most so many steps after the trained ones, evenly spaced; 0: all
    sample.scheduler = ""  # nft, awm: a scheduler class of diffusers to sample with, if images are independent; "": none
    sample.guidance_scale = 5.0  # classifier-free guidance, in training too, unless train.guidance_scale is set; 1: none
    sample.batch_size = 8  # groups (one prompt each) in a batch, so batch_size * split_time images
    sample.num_batches_per_epoch = 32  # batches in a stage, over all processes
    # The next two may be too large for the memory: they are halved until they fit, if one process runs.
    # On the CPU up to four passes of 16 images or more are computed side by side.
    sample.micro_batch_size = 0  # images in one forward pass of the network; 0: the whole batch
    sample.decode_batch_size = 16  # latents decoded at once
    return sample


def rewards() -> ConfigDict:
    """What is rewarded, and each reward's own settings."""
    reward = ConfigDict()
    reward.name = "clip"  # a reward of docs/rewards.md, or your own as package.module:function
    reward.weights = config_dict.placeholder(object)  # a mixture instead of name: {"clip": 1.0, "aesthetic": 0.1}
    reward.combine = "sum"  # sum | advantages: normalise a mixture's rewards each by its own prompt statistics, then weigh
    reward.standardise = False  # True: standardise the rewards of a mixture, by mean and deviation in the first stage
    reward.watch = ()  # rewards that are scored and logged but never trained on: ("pickscore",)
    reward.batch_size = 32  # images scored at once
    reward.num_workers = 4  # threads that read images from disk ahead of scoring
    reward.dtype = "auto"  # of reward models: auto | float32 | float16 | bfloat16; auto: float16 on CUDA, float32 on the CPU
    reward.clip = clip = ConfigDict()
    clip.model = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # CLIP model: hub id or local directory, like all models below
    reward.pickscore = pickscore = ConfigDict()
    pickscore.model = "yuvalkirstain/PickScore_v1"  # CLIP model trained on people's preferences
    reward.aesthetic = aesthetic = ConfigDict()
    aesthetic.clip = "openai/clip-vit-large-patch14"  # CLIP model whose image embeddings the head reads
    aesthetic.head = "trl-lib/ddpo-aesthetic-predictor"  # LAION's head: hub id, directory, .safetensors or .pth file
    reward.bertscore = bertscore = ConfigDict()
    bertscore.captioner = "llava-hf/llava-1.5-7b-hf"  # describes images: any image-text-to-text model of transformers
    bertscore.question = "Answer concisely: what is going on in this image?"  # the captioner's prompt
    bertscore.max_new_tokens = 64  # longest caption, in tokens
    bertscore.reference = "The image contains {prompt}"  # text that a caption is compared with
    bertscore.scorer = "microsoft/deberta-xlarge-mnli"  # text model whose token embeddings are compared
    bertscore.num_layers = 40  # layer of the scorer that gives the embeddings; 0: the last
    reward.image_reward = image_reward = ConfigDict()
    image_reward.model = "RE-N-Y/ImageReward"  # ImageReward, in the format of the package imscore, like the next two
    reward.hps_v2 = hps_v2 = ConfigDict()
    hps_v2.model = "RE-N-Y/hpsv21"  # Human Preference Score v2.1
    reward.vqascore = vqascore = ConfigDict()
    vqascore.model = "RE-N-Y/clip-t5-xxl"  # VQAScore: probability of "yes" to "does this show the prompt?"
    reward.compose = compose = ConfigDict()
    compose.detector = "google/owlv2-base-patch16-ensemble"  # finds objects: an OWLv2, OWL-ViT or Grounding DINO
    compose.clip = "openai/clip-vit-large-patch14"  # CLIP model that tells their colours, as in GenEval
    compose.metadata = ""  # JSON lines in GenEval's format; "": those in .jsonl prompt files, else by the prompt's words
    compose.score = "fraction"  # fraction of a prompt's questions that are answered rightly | all: 1 if all are, else 0
    compose.threshold = 0.2  # an object counts if the detector's score is above this
    compose.count_threshold = 0.3  # the same for prompts that ask for a number of objects
    compose.overlap = 0.5  # of boxes of one class with more intersection over union than this the surest stays; 1: all stay
    compose.margin = 0.1  # part of the objects' sizes by which they must be apart, to be left of or above another
    reward.http = http = ConfigDict()
    http.url = ""  # URL of a reward server, http://HOST:PORT/ (docs/reward_server.py is one)
    http.timeout_sec = 60.0  # longest wait for the scores of a batch, in seconds
    http.num_retries = 3  # how often a batch is sent again if the server is down, too slow, or has an internal error
    reward.vlm = vlm = ConfigDict()
    vlm.url = ""  # an OpenAI-compatible server, up to its version: http://HOST:PORT/v1
    vlm.model = ""  # the vision-language model, as the server calls it
    vlm.score = "yes"  # yes: probability of this answer, from log-probabilities | rating: a number that it writes
    vlm.questions = ()  # asked about each image, {prompt} stands for its prompt; (): whether, or how well, it is shown
    vlm.question_weights = ()  # of the questions' scores in the reward; (): all alike
    vlm.scale = (0, 10)  # the lowest and the highest rating, which count as 0 and 1
    vlm.max_tokens = 256  # longest answer with a rating, in tokens; models that think first need more
    vlm.unreadable = "stop"  # stop | mean: an image whose answer cannot be read gets the mean score of its prompt's others
    vlm.extra_body = config_dict.placeholder(object)  # further fields of a request, such as {"top_p": 1}
    vlm.concurrency = 8  # requests at once
    vlm.timeout_sec = 60.0  # longest wait for an answer, in seconds
    vlm.num_retries = 3  # how often a request is sent again if the server is down, too slow, busy, or has an internal error
    return reward


def selection() -> ConfigDict:
    """How rewards become advantages, and which images are trained on. So do train.beta1, train.beta2, train.adv_clip_max."""
    select = ConfigDict()
    select.history_cnt = 8  # earlier stages whose rewards count in a prompt's mean and standard deviation
    select.advantage = "prompt"  # prompt | group: subtract the mean reward of the prompt, or of the group
    select.images = "pairs"  # trained on: pairs (best and worst of a group, by the thresholds) | all (every image)
    select.pos_threshold = 0.5  # keep a group's best image if its normalised reward is at least this
    select.neg_threshold = -0.5  # keep a group's worst image if its normalised reward is below this
    return select


def judging() -> ConfigDict:
    """Judging checkpoints. Nothing here changes what is trained."""
    evaluation = ConfigDict()
    evaluation.prompt_file = "config/prompt/template1_test.json"  # held-out prompts, to judge on; "": training prompts
    evaluation.judge = ""  # reward whose mean is reported as accuracy, never trained on, such as shapes; "": none
    evaluation.diversity = ("clip",)  # features in which a prompt's images are compared: clip, layout, inception
    evaluation.inception = inception = ConfigDict()
    inception.model = "google/vit-base-patch16-224"  # image classifier of the Inception Score
    evaluation.num_images = 256  # images for each prompt file
    evaluation.batch_size = 32  # images generated at once
    evaluation.seed = 0  # of the evaluation noise; keep it, and all checkpoints are compared on the same noise
    evaluation.every = 10  # evaluate on held-out prompts after every so many stages of a run; 0: only at its end
    evaluation.deployed = deployed = ConfigDict()  # the sampler that users of the LoRA will use, judged beside training's
    deployed.scheduler = ""  # scheduler class of diffusers, such as DPMSolverMultistepScheduler; "": DDIM, or flow's Euler
    deployed.num_steps = 50  # sampler steps
    deployed.eta = 0.0  # the scheduler's eta, if it has one, as DDIM has; 0 is deterministic
    deployed.guidance_scale = 0.0  # classifier-free guidance; 0: as in training
    return evaluation


def training() -> ConfigDict:
    """Training the LoRA on what was selected."""
    train = ConfigDict()
    # reinforce is unclipped, dpok is ddpo with a KL to the base, d3po is DPO on pairs. nft and awm noise images again.
    train.objective = "ddpo"  # ddpo | reinforce | dpok | d3po | nft | awm
    train.num_epochs = 2  # passes over the selected trajectories of a stage
    train.batch_size = 2  # an update takes batch_size * gradient_accumulation_steps trajectories with all their steps
    train.gradient_accumulation_steps = 64  # only its product with batch_size counts
    train.micro_batch_size = 16  # transitions (steps of trajectories) in one forward pass; changes memory and speed only
    train.gradient_checkpointing = False  # True: recompute activations, not keep them. Slower, less memory, same result
    train.timestep_fraction = 1.0  # fraction of a trajectory's S trained steps that an update uses, drawn at random
    train.unconditional_gradient = True  # False: no gradient through guidance's unconditional half; faster, another gradient
    train.learning_rate = 1e-4  # of AdamW, in the first stage
    train.final_rate = 1.0  # factor of the learning rate in the last stage, to which it falls evenly; 1: constant
    train.adam_beta1 = 0.9  # decay of AdamW's mean gradient
    train.adam_beta2 = 0.999  # decay of AdamW's mean squared gradient
    train.adam_weight_decay = 1e-4  # weight decay of AdamW
    train.adam_epsilon = 1e-8  # added to AdamW's denominator
    train.use_8bit_adam = False  # True: the 8-bit AdamW of bitsandbytes, which must be installed
    train.max_grad_norm = 1.0  # gradients are clipped to this norm
    train.ema = 0.0  # decay per update of an exponential average of the LoRA, kept beside it; 0: none (docs/method.md)
    train.eps = 0.1  # PPO's clip range; log-ratios are means over the latent dimensions (docs/method.md)
    train.kl_weight = 0.1  # dpok: weight of the KL to the base model, a mean over the latent dimensions
    train.dpo_beta = 0.1  # d3po: beta of log-ratios that are means over the D latent dimensions (docs/method.md)
    train.noise_levels = 1  # nft, awm: noised copies of an image in an update, each with noise of another level
    train.guidance_scale = (
        0.0  # nft, awm: guidance of the outputs that are trained; 0: as in sampling; 1: none, half the cost
    )
    train.nft_beta = 1.0  # nft: how far the two outputs that are compared lie from that of the policy that sampled
    train.nft_scale = 1.0  # nft: advantage from which on an image counts as wholly good, or below minus that as wholly bad
    train.awm_clip = 0.2  # awm: clip range of the ratio of matching losses, which are means over the latent dimensions
    train.old_weight = 0.3  # nft, awm: weight of the squared distance of outputs to those of the policy that sampled
    train.base_weight = 0.0  # nft, awm: the same to the base model's; above 0 it costs another forward pass
    train.outside_weight = 0.0  # nft, awm: the same at a fifth of the copies, where nothing is trained (method.md)
    train.beta1 = 1.0  # factor of positive advantages
    train.beta2 = 1.0  # factor of negative advantages
    train.adv_clip_max = 5.0  # advantages are clamped to +- this
    train.step_weight = "none"  # weight of a step: none (1) | leverage (1 / leverage) | sigma (its noise); docs/method.md
    train.lora_rank = 4  # rank of the LoRA; its alpha always equals the rank
    train.lora_mlp = False  # True: the LoRA is on the MLPs of the network's blocks, too, and not on attention alone
    train.save_interval = 2  # epochs between checkpoints; the last epoch is always saved
    return train


def kept_files() -> ConfigDict:
    """What stays on disk."""
    keep = ConfigDict()
    keep.samples = False  # True: keep all trajectories. Otherwise they are deleted once they are no longer needed
    keep.images = -1  # images of each stage that stay after its training; -1: all
    keep.eval_images = 1  # newest judged stages whose images stay, beside those of the base and the best; -1: all stages
    return keep


def share_older_names(config: ConfigDict) -> None:
    """The names that the paper's repository and earlier versions have for keys work, too: either name sets the same value.

    An experiment records today's name (b2diffurl/configuration/keys.py: renamed_from).
    """
    for name in ("history_cnt", "advantage", "pos_threshold", "neg_threshold"):
        config.eval[name] = config.selection.get_ref(name)
    config.eval.selection = config.selection.get_ref("images")


def sd14(config: ConfigDict) -> None:
    """Stable Diffusion v1.4 with the paper's settings: 100 stages of 1,280 images, 128,000 in all.

    Preset=sd14 ExpName=my_run bash run_process.sh, one CUDA GPU. Training takes about 35 GiB; on a smaller GPU batches are
    halved until they fit. About 16 hours on an H200, by arithmetic from measured speeds (docs/performance.md). No whole run
    was made, so there is no expected reward.
    """


def sd14_10gb(config: ConfigDict) -> None:
    """`sd14` for a GPU of 10 GB: smaller micro-batches and recomputed activations, the same updates up to rounding. Slower.

    Preset=sd14_10gb ExpName=my_run bash run_process.sh, one CUDA GPU. Neither its peak memory nor its time was measured yet.
    """
    config.sample.micro_batch_size = 8
    config.sample.decode_batch_size = 2
    config.reward.batch_size = 8
    config.train.micro_batch_size = 2
    config.train.gradient_checkpointing = True


def sd14_nft(config: ConfigDict) -> None:
    """Stable Diffusion v1.4, B2 with the objective nft: 30 stages of 1,280 images, 38,400 in all.

    Preset=sd14_nft ExpName=my_run bash run_process.sh, one CUDA GPU. It was derived from what worked on the small model, as
    docs/method.md says. It has not run on Stable Diffusion, so there is no time and no expected reward.
    """
    config.stage_cnt = 30
    config.curriculum = "early"  # what an image shows is decided in the first steps
    config.split_step_left = 10  # of 20, the same shares as 4 to 6 of the small model's 8
    config.split_step_right = 15
    config.selection.images = "all"
    config.train.objective = "nft"
    config.train.old_weight = 0.3
    config.train.outside_weight = 16.0
    config.train.guidance_scale = 1.0  # images are sampled with guidance, and the output without it is trained
    config.train.num_epochs = 3  # three levels of noise an image
    config.train.save_interval = 3
    config.train.gradient_accumulation_steps = 16  # 32 images an update, so 120 updates a stage
    config.train.learning_rate = 3e-4
    config.train.final_rate = 0.1
    config.train.lora_rank = 16


def less_memory(config: ConfigDict) -> None:
    """What the presets for 24 GB share. None of it changes the updates but by rounding."""
    config.pretrained.offload = True
    config.reward.batch_size = 8
    config.train.gradient_checkpointing = True


def larger_latents(config: ConfigDict) -> None:
    """Ranges of ratios for D = 65,536 latent dimensions, four times those of v1.4: 4 x 128 x 128, or 16 x 64 x 64.

    The losses of nft are means over D, so none of its settings changes. Ratios are D-th roots, and D * c is what compares
    (docs/method.md). The models with this D add no noise in their last step, so ddpo and its kin cannot train it. The
    presets' windows end before it.
    """
    config.train.eps = 2.5e-5  # of ddpo: DDPO's 1e-4 at D = 16,384
    config.train.dpo_beta = 65_536.0  # of d3po: a beta of 1 for joint log-ratios


def sdxl(config: ConfigDict) -> None:
    """SDXL at 1024 px, B2 with the objective nft: 30 stages of 640 images, 19,200 in all.

    Preset=sdxl ExpName=my_run bash run_process.sh, one CUDA GPU of 80 GB. Its settings are those of `sd14_nft`, changed as
    the comments say. It has not run on real weights, so there is no time, no memory and no expected reward. At
    pretrained.resolution=512 an image costs about a quarter; SDXL draws worse there.
    """
    sd14_nft(config)
    larger_latents(config)
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.train.learning_rate = 1e-4  # of diffusers' own training script for LoRAs on SDXL
    config.sample.num_batches_per_epoch = 16  # half the images of sd14_nft: each costs several times as much
    config.train.gradient_accumulation_steps = 8  # 16 images an update, so that a stage makes as many updates, 120
    config.sample.micro_batch_size = 8
    config.sample.decode_batch_size = 2  # the VAE runs in float32
    config.train.micro_batch_size = 4
    config.eval.num_images = 128
    config.eval.deployed.scheduler = "EulerDiscreteScheduler"  # the model's own
    config.eval.deployed.num_steps = 30


def sdxl_24gb(config: ConfigDict) -> None:
    """`sdxl` for a GPU of 24 GB: text encoders offloaded, small micro-batches, activations recomputed. Slower.

    Preset=sdxl_24gb ExpName=my_run bash run_process.sh, one CUDA GPU. In bf16 the UNet takes 5.1 GB, the text encoders
    1.6 GB and the VAE, in float32, 0.3 GB. Its peak memory was not measured.
    """
    sdxl(config)
    less_memory(config)
    config.sample.micro_batch_size = 2
    config.sample.decode_batch_size = 1
    config.train.micro_batch_size = 1


def sd35(config: ConfigDict) -> None:
    """Stable Diffusion 3.5 medium at 512 px, B2 with the objective nft: 30 stages of 1,280 images, 38,400 in all.

    Preset=sd35 ExpName=my_run bash run_process.sh, one CUDA GPU of 80 GB. Its settings are those of `sd14_nft`, changed as
    the comments say. It has not run on real weights, so there is no time, no memory and no expected reward. For
    stable-diffusion-3.5-large (pretrained.model), whose transformer takes 16 GB in bf16, set train.micro_batch_size=2.
    Both are gated: accept the license on the model's page, then `hf auth login`.
    """
    sd14_nft(config)
    larger_latents(config)
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    config.pretrained.resolution = 512  # as Flow-GRPO tunes it; at 1024, its own, D is 262,144
    config.sample.num_steps = 10  # Flow-GRPO samples its training images with 10 steps, and judges with 40
    config.sample.eta = 0.8  # Flow-GRPO's noise level for cps. eta means something else to DDIM, where it is 1
    config.sample.guidance_scale = 4.5  # of the model's card
    config.split_step_left = 5  # of 10, the shares of sd14_nft. The last step, without noise, is never in the window
    config.split_step_right = 7
    config.train.lora_rank = 32  # Flow-GRPO's, as is the learning rate of sd14_nft, 3e-4
    config.sample.micro_batch_size = 20  # half a batch
    config.sample.decode_batch_size = 8
    config.train.micro_batch_size = 8
    config.eval.deployed.num_steps = 40  # by the model's own Euler scheduler


def sd35_24gb(config: ConfigDict) -> None:
    """`sd35` for a GPU of 24 GB: text encoders offloaded, small micro-batches, activations recomputed. Slower.

    Preset=sd35_24gb ExpName=my_run bash run_process.sh, one CUDA GPU, and 20 GB of main memory. In bf16 the transformer
    takes 4.9 GB, T5 9.5 GB, the two CLIP text encoders 1.6 GB and the VAE 0.2 GB. All of them are on the GPU only while
    prompts are encoded. LoRA and AdamW take 0.4 GB. Its peak memory was not measured.
    """
    sd35(config)
    less_memory(config)
    config.sample.micro_batch_size = 8
    config.sample.decode_batch_size = 2
    config.train.micro_batch_size = 2


def flux(config: ConfigDict) -> None:
    """FLUX.1-dev at 512 px, B2 with the objective nft: 30 stages of 640 images, 19,200 in all.

    Preset=flux ExpName=my_run bash run_process.sh, one CUDA GPU of 80 GB: in bf16 the transformer takes 23.8 GB and T5
    9.5 GB. Its settings are those of `sd14_nft`, changed as the comments say. It has not run on real weights, so there is no
    time, no memory and no expected reward. The model is gated: accept the license on its page, then `hf auth login`. For
    FLUX.1-schnell (pretrained.model) set sample.guidance_scale=1, sample.num_steps=4, split_step_left=2, split_step_right=3
    and eval.deployed.num_steps=4.
    """
    sd14_nft(config)
    larger_latents(config)
    config.pretrained.model = "black-forest-labs/FLUX.1-dev"
    config.pretrained.resolution = 512  # as Flow-GRPO tunes it; at 1024 D is 262,144
    config.sample.num_steps = 6  # Flow-GRPO samples its training images with 6 steps, and judges with 28
    config.sample.eta = 0.8  # Flow-GRPO's noise level for cps. eta means something else to DDIM, where it is 1
    config.sample.guidance_scale = 3.5  # an input of the network, which was distilled for it: no second pass
    config.train.guidance_scale = 0.0  # as in sampling: at another scale it is another function
    config.split_step_left = 3  # of 6, the shares of sd14_nft. The last step, without noise, is never in the window
    config.split_step_right = 4
    config.train.learning_rate = 1e-4  # of diffusers' own training script for LoRAs on FLUX
    config.train.lora_rank = 32
    config.sample.num_batches_per_epoch = 16  # half the images of sd14_nft: each costs several times as much
    config.train.gradient_accumulation_steps = 8  # 16 images an update, so that a stage makes as many updates, 120
    config.sample.micro_batch_size = 20  # half a batch
    config.sample.decode_batch_size = 8
    config.train.micro_batch_size = 2
    config.eval.num_images = 128
    config.eval.deployed.num_steps = 28  # by the model's own Euler scheduler


def shapes(config: ConfigDict) -> None:
    """The default: the small model with the objective nft, 5 stages of 1,440 images, 7,200 in all.

    bash run_process.sh, two CPU cores, 5 minutes. Accuracy rises from 52 to 94 % on training prompts and from 51 to 91 % on
    held-out prompts (means of three seeds).
    """
    shapes_ddpo(config)
    noised(config)
    config.exp_name = "shapes"
    config.prompt_file = "config/prompt/shapes_relation_train_all.json"  # more prompts carry over better to others
    config.stage_cnt = 5
    config.sample.num_steps = 8
    config.sample.num_batches_per_epoch = 9
    config.sample.micro_batch_size = 0
    config.eval.batch_size = 128
    config.selection.images = "all"
    config.train.nft_scale = 1.0
    config.train.guidance_scale = 1.0  # images are sampled with guidance, and the output without it is trained
    config.train.outside_weight = 16.0
    config.train.num_epochs = 3
    config.train.save_interval = 3


def shapes_flow(config: ConfigDict) -> None:
    """The default run on a flow-matching model of Stable Diffusion 3's layout: 4 stages of 960 images, 3,840 in all.

    Preset=shapes_flow bash run_process.sh, two CPU cores, 3 minutes. Accuracy rises from 56 to 92 % on training prompts
    and from 54 to 90 % on held-out prompts (means of three seeds).
    """
    shapes(config)
    config.exp_name = "shapes_flow"
    config.pretrained.model = "model/shapes_flow"
    config.pretrained.max_sequence_length = 0  # it has no T5
    config.stage_cnt = 4
    config.sample.num_batches_per_epoch = 6
    config.train.learning_rate = 1e-3


def noised(config: ConfigDict) -> None:
    """Settings of nft for the small model, at 8 steps. docs/shapes.md says how they were found."""
    config.curriculum = "early"  # a relation is decided in the first two steps
    config.split_step_left = 4
    config.split_step_right = 6
    config.train.objective = "nft"
    config.train.nft_scale = 0.5  # the threshold of a pair: its images count as wholly good and wholly bad
    config.train.old_weight = 0.3
    config.train.outside_weight = 4.0
    config.train.num_epochs = 6  # a level of noise in each
    config.train.save_interval = 6
    config.train.batch_size = 32
    config.train.learning_rate = 3e-3
    config.train.final_rate = 0.1


def shapes_ddpo(config: ConfigDict) -> None:
    """The small model with the paper's objective: 8 stages of 3,200 images, 25,600 in all.

    Preset=shapes_ddpo bash run_process.sh, two CPU cores, 16 to 35 minutes. Accuracy rises from 55 to 91 % on training
    prompts and from 52 to 84 % on held-out prompts (means of three seeds).
    """
    config.exp_name = "shapes_ddpo"
    config.seed = 3  # one of the three seeds in docs/results.md
    config.pretrained.model = "model/shapes/base"
    config.reward.clip.model = "model/shapes/clip"
    config.reward.batch_size = 64
    config.prompt_file = "config/prompt/shapes_relation_train.json"
    config.eval.prompt_file = "config/prompt/shapes_relation_test.json"
    config.eval.judge = "shapes"
    config.eval.diversity = ("clip", "layout")
    config.eval.num_images = 512
    config.eval.batch_size = 64
    config.eval.every = 2
    config.eval.deployed.num_steps = 20
    config.stage_cnt = 8
    config.split_step_left = 9  # nearly all steps: a relation is decided in the first two
    config.split_step_right = 10
    config.sample.num_steps = 10
    config.sample.guidance_scale = 2.0  # the base model is most accurate with this at 10 steps
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
    config.train.eps = 0.01  # 0.1 never binds at D = 256 latent dimensions, and long runs collapse
    config.train.dpo_beta = 256.0  # D = 256, so a joint beta of 1; with a tenth of it runs fell apart
    config.train.lora_rank = 16
    config.train.step_weight = "sigma"
    config.keep.images = 64


def b2(config: ConfigDict) -> None:
    """B2-DiffuRL in the study (docs/results.md): 9 stages of 640 images, 5,760 in all.

    Preset=b2 bash run_process.sh, one CPU core, 3 minutes without judging. Held-out accuracy from 43.8 to 50.4 % (mean of
    five seeds). It samples 8 steps without guidance, so an image costs two fifths of one with `shapes_ddpo`.
    """
    shapes_ddpo(config)
    config.exp_name = "b2"
    config.stage_cnt = 9
    config.split_step_left = 6  # of 8, about the same share as the paper's 14 of 20
    config.split_step_right = 8
    config.sample.num_steps = 8
    config.sample.guidance_scale = 1.0
    config.sample.num_batches_per_epoch = 4
    config.train.batch_size = 16
    config.eval.num_images = 384
    config.eval.every = 0
    config.keep.images = 0


def bs(config: ConfigDict) -> None:
    """Branch-based sampling alone, in the study: `b2` with S = L in every stage.

    Preset=bs bash run_process.sh, one CPU core, 2 minutes without judging. Held-out accuracy from 43.8 to 47.4 % (mean of
    five seeds).
    """
    b2(config)
    config.exp_name = "bs"
    config.curriculum = "fixed"


def bpt(config: ConfigDict) -> None:
    """Progressive training alone, in the study: `b2` with siblings that share a prompt but no prefix.

    Preset=bpt bash run_process.sh, one CPU core, 3 minutes without judging. Held-out accuracy from 43.8 to 47.4 % (mean of
    five seeds).
    """
    b2(config)
    config.exp_name = "bpt"
    config.sampling = "independent"


def ddpo(config: ConfigDict) -> None:
    """Plain DDPO, in the study: `b2` with independent images, all T steps trained, and every image trained on.

    Preset=ddpo bash run_process.sh, one CPU core, 6 minutes without judging. Held-out accuracy from 43.8 to 72.9 % (mean of
    five seeds).
    """
    b2(config)
    config.exp_name = "ddpo"
    config.sampling = "independent"
    config.curriculum = "fixed"
    config.split_step_left = config.sample.num_steps
    config.selection.images = "all"


def b2_nft(config: ConfigDict) -> None:
    """B2 with the objective nft, in the study: `b2` with the settings that were best on the development split.

    Preset=b2_nft bash run_process.sh, one CPU core, 4 minutes without judging. Held-out accuracy from 43.8 to 80.9 % (mean
    of five seeds).
    """
    b2(config)
    noised(config)
    config.exp_name = "b2_nft"


PRESETS = {
    "shapes": shapes,
    "shapes_flow": shapes_flow,
    "shapes_ddpo": shapes_ddpo,
    "sd14": sd14,
    "sd14_10gb": sd14_10gb,
    "sd14_nft": sd14_nft,
    "sdxl": sdxl,
    "sdxl_24gb": sdxl_24gb,
    "sd35": sd35,
    "sd35_24gb": sd35_24gb,
    "flux": flux,
    "b2": b2,
    "bs": bs,
    "bpt": bpt,
    "ddpo": ddpo,
    "b2_nft": b2_nft,
}
