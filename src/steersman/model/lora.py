"""LoRA adapters on a model, and the weights that they add up to.

peft is imported where adapters are: it takes seconds, and most runs have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steersman.model.in_place import add_in_place
from steersman.types import SteersmanError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """W + (alpha / r) B A, with A of r rows; B starts at zero, so training starts from the model as it is.

    `targets` are names of linear layers, a regular expression over whole names, or "all-linear" for all but the
    output layer. `train_whole` names modules that are trained as they are, in a copy. `dropout` acts on what the
    adapters read, where gradients are asked for and nowhere else: the log-probabilities of training are random then.
    `dora` learns each row's length beside its direction; `rslora` scales by alpha / sqrt(r).

    Source: arXiv 2106.09685, section 4.1; DoRA 2402.09353, eq. 5; rsLoRA 2312.03732, section 3.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    dora: bool = False
    rslora: bool = False
    train_whole: tuple[str, ...] = ()


def add_lora(model: Any, config: LoraConfig) -> PeftModel:
    """Puts adapters on the model in place; everything else is frozen.

    Raises SteersmanError where `targets` match no layer, or the output layer.
    """
    import peft

    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    with _naming_targets(model, config):
        adapters = peft.get_peft_model(model, _settings(model, config, task))
    _drop_while_learning(model)
    add_in_place(model)
    _require_plain_output(model)
    return adapters  # type: ignore[return-value]


def add_lora_to_trunk(trunk: Any, config: LoraConfig) -> None:
    """Puts adapters on a trunk in place and freezes its weights; the head that reads it stays as it is.

    Raises SteersmanError where `targets` match no layer.
    """
    import peft

    with _naming_targets(trunk, config):
        peft.inject_adapter_in_model(_settings(trunk, config, "FEATURE_EXTRACTION"), trunk)
    _drop_while_learning(trunk)
    add_in_place(trunk)


def _settings(model: Any, config: LoraConfig, task: str) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a float does, whatever its annotation says
        lora_dropout=config.dropout,
        target_modules=config.targets,
        exclude_modules=_routers(model) + _read_by_weight(model) or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
        modules_to_save=list(config.train_whole) or None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2 stores weights transposed
        task_type=task,
    )


def _routers(model: nn.Module) -> list[str]:
    """Linear layers to which a family gave a forward pass that is no plain product, such as a router that gives
    indices too: an adapter can not be added to that."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models.")
        and not _is_product(module)
    ]


def _read_by_weight(model: nn.Module) -> list[str]:
    """Layers of Mamba's mixers of which kernels read the weight alone: an adapter beside it would do nothing."""
    return [
        f"{name}.{part}"
        for name, mixer in model.named_modules()
        if isinstance(getattr(mixer, "conv1d", None), nn.Conv1d)
        and isinstance(getattr(mixer, "D", None), nn.Parameter)
        for part in ("out_proj", "dt_proj")
        if isinstance(getattr(mixer, part, None), nn.Linear)
    ]


@torch.no_grad()
def _is_product(module: nn.Linear) -> bool:
    """Whether the layer gives the product of its input and its weight, plus its bias."""
    x = torch.linspace(-1.0, 1.0, module.in_features).to(module.weight)[None]
    try:
        found = module(x)
    except (TypeError, ValueError, RuntimeError):  # it takes more than one input, or another shape
        return False
    wanted = nn.functional.linear(x, module.weight, module.bias)
    return (
        torch.is_tensor(found) and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)
    )


class LearningDropout(nn.Dropout):
    """Dropout where gradients are asked for, whatever mode the model is in."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(input, self.p, torch.is_grad_enabled())


def _drop_while_learning(model: nn.Module) -> None:
    """Puts that in the place of the adapters' dropout: models are kept in evaluation mode here."""
    from peft.tuners.lora import LoraLayer

    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    module.lora_dropout[name] = LearningDropout(dropout.p)


@contextmanager
def _naming_targets(model: Any, config: LoraConfig) -> Iterator[None]:
    """Turns peft's complaint about targets into one with the names of the layers that there are."""
    try:
        yield
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise SteersmanError(
            f"lora.targets {config.targets!r} do not fit {type(model).__name__}: {error}\n"
            f"Its linear layers are called {', '.join(linear)}; or use 'all-linear'"
        ) from error


def load_lora(model: Any, folder: str, *, trainable: bool) -> PeftModel:
    """Puts the adapters saved in a folder on the model in place. Raises SteersmanError as `add_lora` does."""
    import peft

    adapters = peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    add_in_place(model)
    _require_plain_output(model)
    return adapters


def adapter_state(adapters: PeftModel) -> dict[str, Tensor]:
    """The adapters' tensors under the names that they have in peft's files."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    return get_peft_model_state_dict(adapters)


def take_adapter_state(adapters: PeftModel, state: dict[str, Tensor]) -> None:
    """Puts tensors of such names in the place of the adapters' own; one that is missing stays as it was."""
    from peft.utils.save_and_load import set_peft_model_state_dict

    set_peft_model_state_dict(adapters, state)


def _require_plain_output(model: Any) -> None:
    """Raises SteersmanError if the output layer carries an adapter: it is applied without running the module. So do
    adapters on the embeddings of an encoder-decoder, which has several that share their weights."""
    from peft.tuners.lora import LoraLayer

    on_embeddings = any(isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), nn.Embedding)
                        for m in model.modules())  # fmt: skip
    if on_embeddings and model.config.is_encoder_decoder:
        raise SteersmanError(
            "lora.targets include the embeddings, which the encoder, the decoder and the output layer of an "
            "encoder-decoder share; leave them out"
        )
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise SteersmanError("lora.targets include the output layer, which can not carry an adapter; leave it out")


def tables_differ(model: Any, weight: Callable[[str], Tensor]) -> bool:
    """Whether embedding and output layer differ in a merged state, whose tensors `weight` gives by name: an adapter
    on the embedding alone changes just that one, whether the model began with both as one weight or not."""
    from peft.tuners.lora import LoraLayer

    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, LoraLayer) or output is None:
        return False
    names = {id(module): name for name, module in model.named_modules()}
    return not torch.equal(*(weight(f"{names[id(module)]}.weight") for module in (embedding, output)))
