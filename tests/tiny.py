"""Tiny models of the real classes with random weights, on disk in the layout their real counterparts have."""

import json
import math
import shutil
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    DebertaConfig,
    DebertaModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SwinConfig,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from b2diffurl.configuration.settings import LoraSettings, ModelSettings
from b2diffurl.models import Model
from b2diffurl.models import family as family_of
from benchmarks.full_size import (
    FLUX_SCHEDULER,
    KLEIN_SCHEDULER,
    SCHNELL_SCHEDULER,
    SD3_SCHEDULER,
    XL_SCHEDULER,
    qwen_tokenizer,
    t5_tokenizer,
)
from benchmarks.sd14 import BOS, EOS, V1_4_SCHEDULER

MAX_TOKENS, WIDTH, T5_WIDTH = 77, 16, 40
WORDS = ["a", "red", "blue", "green", "circle", "square", "cross", "and", "what", "is", "in", "this", "picture", "?"]


def stable_diffusion(root: Path, *, prediction_type: str = "epsilon", **scheduler) -> Path:
    """A Stable Diffusion of 8x8x4 latents and 64x64 px in directory `root`; `scheduler` goes into its scheduler's JSON."""
    torch.manual_seed(0)
    tokens = tokenizer()
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
        ),
        vae=vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(tokens))),
        tokenizer=tokens,
        scheduler=PNDMScheduler.from_config(V1_4_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root)
    kind = {} if prediction_type == "epsilon" else {"prediction_type": prediction_type}
    write_scheduler(root, V1_4_SCHEDULER | kind | scheduler)
    return root


def sdxl(root: Path) -> Path:
    """An SDXL of the same sizes in directory `root`, its UNet, encoders and tokenizers in the real ones' proportions."""
    torch.manual_seed(5)
    first, second = tokenizer(), tokenizer(pad="!")
    wide = text_config(second) | {"hidden_size": WIDTH + 8, "num_hidden_layers": 2, "projection_dim": 12}
    pipeline = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=2,
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[1, 2, 4],
            cross_attention_dim=WIDTH + wide["hidden_size"],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + wide["projection_dim"],
        ),
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(first) | {"num_hidden_layers": 2})),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**wide)),
        tokenizer=first,
        tokenizer_2=second,
        scheduler=EulerDiscreteScheduler.from_config(XL_SCHEDULER),
        add_watermarker=False,
    )
    pipeline.save_pretrained(root)
    write_scheduler(root, XL_SCHEDULER)
    return root


def sd3(root: Path, *, t5: bool = True) -> Path:
    """A Stable Diffusion 3.5 of 8x8x4 latents and 64x64 px in directory `root`, with T5 or without it."""
    torch.manual_seed(6)
    first, second = tokenizer(), tokenizer(pad="!")
    text = {"num_hidden_layers": 2, "projection_dim": 12}
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609, force_upcast=True),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**text_config(first) | text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_config(second) | text)),
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=t5_tokenizer() if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SD3_SCHEDULER),
    )
    pipeline.save_pretrained(root)
    write_scheduler(root, SD3_SCHEDULER)
    return root


def flux(root: Path, *, schnell: bool = False) -> Path:
    """A FLUX.1-dev of latents with 4 channels in directory `root`, or a FLUX.1-schnell."""
    torch.manual_seed(7)
    tokens = tokenizer()
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=not schnell,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(tokens))),
        text_encoder_2=t5_encoder(),
        tokenizer=tokens,
        tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(FLUX_SCHEDULER),
    )
    pipeline.save_pretrained(root)
    write_scheduler(root, SCHNELL_SCHEDULER if schnell else FLUX_SCHEDULER)
    return root


def flux2(root: Path, *, distilled: bool = False) -> Path:
    """A FLUX.2-klein-base in directory `root`, or one that is distilled. Its text encoder has the 27 layers in use."""
    torch.manual_seed(8)
    tokens = qwen_tokenizer()
    small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    pipeline = Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        vae=AutoencoderKLFlux2(
            block_out_channels=(4, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64, layers_per_block=1
        ),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokens), num_hidden_layers=27, **small)),
        tokenizer=tokens,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(KLEIN_SCHEDULER),
        is_distilled=distilled,
    )
    pipeline.vae.bn.running_mean.normal_()
    pipeline.vae.bn.running_var.uniform_(0.5, 2.0)
    pipeline.save_pretrained(root)
    write_scheduler(root, KLEIN_SCHEDULER)
    return root


def t5_encoder() -> T5EncoderModel:
    small = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **small))


def vae(**config) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=64,
        **config,
    )


def load_model(
    root: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    config: str = "",
    family: str = "stable_diffusion",
    resolution: int = 0,
    mlp: bool = False,
    **more,
) -> Model:
    """A Stable Diffusion, or a model of another family, with a fresh LoRA."""
    settings = ModelSettings(family, str(root), "main", "", config, resolution, LoraSettings(rank, mlp), **more)
    return family_of(settings).load(settings, device=torch.device("cpu"), dtype=dtype, seed=seed, decoder=True)


def exact_stable_diffusion(root: Path) -> Path:
    """The same architecture, with weights that have the same bits on every machine, so that its checksum is known."""
    stable_diffusion(root)
    for path in root.glob("*/*.safetensors"):
        state = load_file(path)
        for name, weight in state.items():
            if weight.is_floating_point():
                numbers = (torch.arange(weight.numel()) * 40503 + 977 * len(name)) % 65521
                spread = (numbers.double() / 65521 - 0.5) / math.sqrt(max(1, weight[0].numel()))
                flat = torch.ones_like(numbers) if weight.dim() == 1 and name.endswith("weight") else spread
                state[name] = flat.float().view(weight.shape).contiguous()
        save_file(state, path, metadata={"format": "pt"})
    return root


def write_scheduler(root: Path, config: dict) -> None:
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))


def copy_with_scheduler(base: Path, root: Path, change: dict) -> Path:
    """A copy of a model in directory `root`, whose scheduler has v1.4's settings with `change`; None leaves an entry out."""
    shutil.copytree(base, root)
    write_scheduler(root, {key: value for key, value in (V1_4_SCHEDULER | change).items() if value is not None})
    return root


def clip(root: Path) -> Path:
    """A CLIP model with its tokenizer and image processor in directory `root`."""
    torch.manual_seed(1)
    tokens = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = CLIPTextConfig(**text_config(tokens))
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)).save_pretrained(
        root
    )
    tokens.save_pretrained(root)
    image_processor().save_pretrained(root)
    return root


def classifier(root: Path) -> Path:
    """An image classifier of seven classes with its image processor, whose classes differ from image to image."""
    torch.manual_seed(4)
    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        num_labels=7, initializer_range=1.0,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(root)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root)
    return root


def owlv2(root: Path) -> Path:
    """An OWLv2 of 16 boxes an image with its processor in directory `root`; they differ from image to image."""
    torch.manual_seed(9)
    tokens = tokenizer()
    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = text_config(tokens) | {"pad_token_id": tokens.eos_token_id}
    vision |= {"image_size": 32, "patch_size": 8}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=WIDTH)
    model = Owlv2ForObjectDetection(config)
    model.box_head.dense2.weight.data *= 0.02  # as drawn, it makes boxes without any width
    model.save_pretrained(root)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokens).save_pretrained(root)
    return root


def grounding_dino(root: Path) -> Path:
    """A Grounding DINO of 12 boxes an image with its processor in directory `root`, likewise."""
    torch.manual_seed(10)
    words = ["[PAD]", "[UNK]", "[MASK]", *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    numbers = {word: number for number, word in enumerate(words)}
    # The model knows marks and full stops by BERT's own numbers.
    numbers |= {f"[unused{number}]": number for number in range(len(words), 1030)}
    for mark, number in {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}.items():
        del numbers[f"[unused{number}]"]
        numbers[mark] = number
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 32}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4,
            out_indices=[2, 3],
        ),
        text_config=BertConfig(vocab_size=len(numbers), **heads),
        num_queries=12, encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=2, d_model=32, num_feature_levels=3, max_text_len=64,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(root)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(processor, BertTokenizer(vocab=numbers)).save_pretrained(root)
    return root


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def llava(root: Path, *, seed: int = 2, answers: Sequence[str] = ()) -> Path:
    """A LLaVA with its processor and chat template in directory `root`; it says words of the tests' prompts or `answers`."""
    torch.manual_seed(seed)
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS, *answers, "USER:", "ASSISTANT:"]
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=word_level(words, "<unk>"),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    small = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=WIDTH),
        text_config=LlamaConfig(**small, vocab_size=len(tokens), max_position_embeddings=128, **marks),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():  # as drawn, all pictures get one caption: enlarge what tells them apart
        if "projector" in name or "patch_embedding" in name or "lm_head" in name:
            weight.data *= 20
    if answers:
        said = tokens.convert_tokens_to_ids(list(answers))
        weight = model.lm_head.weight.data
        weight[[n for n in range(len(weight)) if n not in said]] = 0  # so that others are never the likeliest
        weight /= 20
        for layer in model.model.language_model.layers:  # the image decides what is said
            layer.self_attn.v_proj.weight.data *= 20
            layer.self_attn.o_proj.weight.data *= 20
        weight[said[len(said) // 2 :]] = -weight[said[: len(said) // 2]]
    model.save_pretrained(root)
    LlavaProcessor(
        image_processor(),
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    ).save_pretrained(root)
    return root


def deberta(root: Path, *, seed: int = 3) -> Path:
    """A DeBERTa of 3 layers with its tokenizer in directory `root`; an unknown word is one token."""
    torch.manual_seed(seed)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "the", "contains", "image", *WORDS]
    wordwise = word_level(words, "[UNK]")
    wordwise.normalizer = normalizers.Lowercase()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    wordwise.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=wordwise, **names).save_pretrained(root)
    config = DebertaConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_position_embeddings=128,
        type_vocab_size=0,
        position_biased_input=False,
        initializer_range=0.3,
    )
    DebertaModel(config).save_pretrained(root)
    return root


def word_level(words: list[str], unknown: str) -> Tokenizer:
    """A token a word."""
    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokens


def aesthetic_head(root: Path, width: int) -> dict[str, torch.Tensor]:
    """LAION's aesthetic head for embeddings [N,width], as head.pth and head.safetensors in directory `root`; its tensors
    by their names there."""
    torch.manual_seed(4)
    widths, state = (width, 1024, 128, 64, 16, 1), {}
    for number, before, after in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        layer = nn.Linear(before, after)
        state |= {f"layers.{number}.{name}": tensor.data for name, tensor in layer.named_parameters()}
    root.mkdir(parents=True)
    torch.save(state, root / "head.pth")
    save_file(state, root / "head.safetensors")
    return state


def tokenizer(pad: str = EOS) -> CLIPTokenizer:
    """One token a letter, its form at the end of a word, and CLIP's two marks; the end mark also pads, or a token `pad`."""
    vocabulary = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")] + [BOS, EOS]
    vocabulary = vocabulary if pad == EOS else [pad, *vocabulary]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbers, merges=[], model_max_length=MAX_TOKENS, pad_token=pad)


def text_config(tokens: CLIPTokenizer) -> dict:
    return {
        "vocab_size": len(tokens),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
