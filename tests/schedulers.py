"""Stock diffusers' schedulers, and our tables of their steps."""

import tiny
from diffusers import DDIMScheduler

from b2diffurl.algorithm.transition import Transitions
from b2diffurl.models.noise_schedule import make_table

# scheduler_config.json of models on the hub, by the model's name; their _diffusers_version is left out.
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_PNDM = _SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
_EULER = _SD | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon"}
HUB_CONFIGS = {
    "stable-diffusion-v1-4": tiny.V1_4_SCHEDULER,
    "stable-diffusion-v1-5": _PNDM | {"set_alpha_to_one": False, "clip_sample": False},
    "stable-diffusion-2-base": _PNDM | {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": "epsilon"},
    "stable-diffusion-2-1": _SD
    | {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction", "set_alpha_to_one": False}
    | {"skip_prk_steps": True, "steps_offset": 1, "trained_betas": None},
    "stable-diffusion-xl-base-1.0": tiny.XL_SCHEDULER,
    "sd-turbo": _EULER
    | {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
    | {"timestep_spacing": "trailing", "trained_betas": None, "use_karras_sigmas": False},
    "LCM_Dreamshaper_v7": _SD
    | {"_class_name": "LCMScheduler", "clip_sample": False, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995}
    | {"original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "steps_offset": 1}
    | {"sample_max_value": 1.0, "set_alpha_to_one": True, "thresholding": False, "timestep_spacing": "leading"},
}


def stock(num_steps: int, **config) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(tiny.V1_4_SCHEDULER | config)
    scheduler.set_timesteps(num_steps)
    return scheduler


def ours(scheduler: DDIMScheduler, eta: float) -> Transitions:
    return make_table(scheduler, len(scheduler.timesteps), eta)


def v1_4_table(num_steps: int, prediction_type: str = "epsilon") -> Transitions:
    return ours(stock(num_steps, prediction_type=prediction_type), 1.0)
