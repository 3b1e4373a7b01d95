"""How settings that stock diffusers classes do not know live in a config that they load.

Ours sit in one private entry, which stock classes load and save again without a word. Each of the
others has a stand-in that stock classes can work with:

- `variance_type`: the learned type where the network outputs a variance, as they must know to split
  its output, and "fixed_small" elsewhere.
- `beta_schedule`: a schedule that not every stock scheduler knows by name is written out, as
  `trained_betas`.
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import ConfigMixin, FrozenDict

from .core.schedules import make_betas

PRIVATE_ENTRY = "_ddpm_notes"
PRIVATE_SETTINGS = ("original_sample_mse", "decoder_variance", "levels", "log_snr_range", "eta")
PRIVATE_VARIANCE = "optimal"
STOCK_CLASS = "DDPMScheduler"
STOCK_FALLBACK = "fixed_small"
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # that all stock schedulers know


class StockConfigMixin(ConfigMixin):
    """A config under a stock class's name, with our settings in a private entry.

    A subclass keeps `variance_type`, and each private setting that it changes, in an attribute of
    that name, and calls `hide_private_settings` once they are set.
    """

    variance_type: str

    def hide_private_settings(self) -> None:
        """Move what stock classes do not know into the private entry."""
        config = {name: value for name, value in self.config.items() if name not in PRIVATE_SETTINGS}
        ours = {
            name: value
            for name in PRIVATE_SETTINGS
            if (value := vars(self).get(name, self.config.get(name))) is not None
        }
        if self.variance_type == PRIVATE_VARIANCE:
            ours["variance_type"], config["variance_type"] = PRIVATE_VARIANCE, STOCK_FALLBACK
        schedule = config["beta_schedule"]
        if schedule not in STOCK_SCHEDULES and config["trained_betas"] is None:
            ours |= {"beta_schedule": schedule, "trained_betas": None}
            config |= {"beta_schedule": "linear", "trained_betas": _betas(config, ours)}
        if ours:
            config[PRIVATE_ENTRY] = ours
        # "_use_default_values" is an entry of stock configs, too: only of settings that they know,
        # and that are what the user gave
        hidden = {*PRIVATE_SETTINGS, *ours}
        defaults = [name for name in config.pop("_use_default_values", []) if name not in hidden]
        if defaults:
            config["_use_default_values"] = defaults
        self._internal_dict = FrozenDict(config)

    def private_setting(self, name: str) -> Any:
        """The configured value of a private setting, None where there is none."""
        return self.config.get(PRIVATE_ENTRY, {}).get(name)

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers', under the stock class's name.

        By that name `from_config` of other classes knows what to pass over without a warning.
        """
        if "_use_default_values" in kwargs:
            # diffusers lists arguments given by position here, too; `from_config` would lose them
            parameters = inspect.signature(type(self).__init__).parameters
            names = [name for name in kwargs["_use_default_values"] if kwargs[name] is parameters[name].default]
            kwargs["_use_default_values"] = names
        if "_class_name" in kwargs:
            kwargs["_class_name"] = STOCK_CLASS
        super().register_to_config(**kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers': from a config of this or of any compatible class, changed by `kwargs`."""
        stock_variance_type = config.get("variance_type") if isinstance(config, dict) else None
        if isinstance(config, dict) and PRIVATE_ENTRY in config:
            config = _with_own_settings(config)
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        if scheduler.variance_type == PRIVATE_VARIANCE and stock_variance_type in ("learned", "learned_range"):
            ours = {**scheduler.config[PRIVATE_ENTRY], "stock_variance_type": stock_variance_type}
            scheduler.register_to_config(variance_type=stock_variance_type, **{PRIVATE_ENTRY: ours})
        return made

    def to_json_string(self) -> str:
        """The config as JSON, under the stock class's name: any diffusers loads it."""
        config = json.loads(super().to_json_string())
        self.register_to_config(_class_name=STOCK_CLASS)
        return json.dumps({**config, "_class_name": STOCK_CLASS}, indent=2, sort_keys=True) + "\n"


def _betas(config: Mapping[str, Any], ours: Mapping[str, Any]) -> list[float]:
    """The T betas of our named schedule, by the config's other settings."""
    T, start, end = (config[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
    return make_betas(T, start, end, ours["beta_schedule"], log_snr_range=ours.get("log_snr_range")).tolist()


def _with_own_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with our settings in the place of their stand-ins.

    A stand-in that somebody has changed since stays, as the choice is theirs.
    """
    config = dict(config)
    ours = dict(config.pop(PRIVATE_ENTRY))
    if config.get("variance_type") != ours.pop("stock_variance_type", STOCK_FALLBACK):
        ours.pop("variance_type", None)
    if "beta_schedule" in ours and config.get("trained_betas") != _betas(config, ours):
        del ours["beta_schedule"], ours["trained_betas"]
    defaults = [name for name in config.get("_use_default_values", []) if name not in ours]
    return {**config, **ours, "_use_default_values": defaults}
