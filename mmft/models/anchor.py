"""The anchor: how far fine-tuning has moved the weights from the pretrained ones, as a differentiable penalty.

With LoRA the pretrained weights are still in the model, and the distance is exactly that of the merged weights, from
r x r products alone (with DoRA, from those and products with the weights). Weights trained in place (full fine-tuning,
biases) are compared with copies made at construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmft.functional.regularize import adapter_penalty, dora_l2, l2_to_reference, lora_l2, squared_norm, total
from mmft.types import LossOutput

L2_DISTANCE = "anchor/l2_distance"
L2_LOSS = "anchor/l2_loss"
ADAPTER_PENALTY = "adapter/penalty"

# Initialisations that subtract the adapter's first value from the base weight: the adapter's norm is then not the
# distance to the pretrained weights. PEFT allows suffixes, as in "pissa_niter_16".
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Anchor:
    """Penalty on the distance to the pretrained weights, and on the size of the adapter.

    Equation: E22, E25
        loss = l2 ||theta - theta_pretrained||^2 + adapter_penalty ||phi||^2

    theta are the effective (merged) weights of everything that trains, phi the factors A and B (and biases) of LoRA;
    DoRA's magnitudes, whose resting point isn't 0, are no part of phi.
    A coefficient of 0 switches its part off: nothing is computed, and weights trained in place are not copied.

    Args:
        model: the policy alone (a critic's head has no pretrained value), with LoRA adapters or trained in full.
            The adapters that are active now are its own, whichever are later; a critic's adapter beside them isn't.
            Build the anchor before a checkpoint of weights trained in place is loaded into the model.
        l2, adapter_penalty: coefficients, at least 0.

    Raises:
        ValueError: a negative coefficient, an adapter penalty without an adapter, or l2 with an adapter whose distance
            to the pretrained weights is not known; the message names the layer or the option.

    Parameters are looked up at each call, so the model may be moved or wrapped after construction.
    """

    def __init__(self, model: nn.Module, l2: float = 0.0, adapter_penalty: float = 0.0) -> None:
        if l2 < 0 or adapter_penalty < 0:
            raise ValueError(f"anchor coefficients must be at least 0, got l2={l2}, adapter_penalty={adapter_penalty}")
        self.l2 = l2
        self.adapter_penalty = adapter_penalty
        self._adapted = [(layer, adapters) for _, layer, adapters in _adapted_layers(model)]
        saved = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        self._saved = [(w, a) for w in saved for a in w.active_adapters if a in w.modules_to_save]
        if adapter_penalty > 0 and not self._adapted:
            raise ValueError("adapter_penalty needs an adapter: the model has no active LoRA layer")
        obstacle = _obstacle(model)
        if obstacle and l2 > 0:
            raise ValueError(f"anchor.l2 cannot be measured: {obstacle}")
        in_place = _trained_in_place(model, saved)
        # The module and not the parameter is kept: sharding replaces parameters.
        self._copied = [(m, name, getattr(m, name).detach().clone()) for m, name in in_place] if l2 > 0 else []
        self._measurable = l2 > 0 or not (obstacle or in_place)

    def penalty(self) -> LossOutput:
        """The weighted penalty, to be added to the task's loss before its one backward pass.

        Metrics: `anchor/l2_distance` = ||theta - theta_pretrained||, `anchor/l2_loss` and `adapter/penalty` = the two
        terms as they enter the loss; each only where its coefficient is above 0.
        """
        terms: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if self.l2 > 0:
            squared = self._squared_distance()
            terms.append(self.l2 * squared)
            metrics |= {L2_DISTANCE: squared.detach().sqrt(), L2_LOSS: terms[-1].detach()}
        if self.adapter_penalty > 0:
            phi = [p for layer, adapters in self._adapted for p in _factors_and_biases(layer, adapters)]
            terms.append(self.adapter_penalty * adapter_penalty(phi))
            metrics[ADAPTER_PENALTY] = terms[-1].detach()
        return LossOutput(total(terms), metrics)

    @torch.no_grad()
    def distance(self) -> float | None:
        """||theta - theta_pretrained||, for logs. None where it is not known: with l2 = 0 no weights are copied."""
        return self._squared_distance().sqrt().item() if self._measurable else None

    def _squared_distance(self) -> Tensor:
        return total([*self._lora_squares(), *self._saved_squares(), *self._copied_squares()])

    def _lora_squares(self) -> Iterator[Tensor]:
        """Squared distances of LoRA layers; layers of one shape and scale go through one batched product.

        No faster on a CPU; a GPU is spared some ten kernel launches a layer, which are all that this costs there.
        """
        groups: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for layer, adapters in self._adapted:
            if bias := _scaled_biases(layer, adapters):
                yield squared_norm([torch.stack(bias).sum(0)])
            if _has_magnitudes(layer, adapters[0]):
                yield _dora_square(layer, adapters[0])
            elif _is_factored(layer, adapters[0]):
                A, B, scale = _joint_factors(layer, adapters)
                groups[(A.shape, B.shape, A.device, A.dtype, B.dtype, scale)].append((A, B))
            else:
                yield squared_norm([torch.stack([layer.get_delta_weight(adapter) for adapter in adapters]).sum(0)])
        for (*_, scale), factors in groups.items():
            A, B = (torch.stack(tensors) for tensors in zip(*factors, strict=True))
            yield lora_l2(A, B, scale).sum()

    def _saved_squares(self) -> Iterator[Tensor]:
        """Squared distances of modules that PEFT trains as copies beside the original (`modules_to_save`)."""
        for wrapper, adapter in self._saved:
            trained, original = wrapper.modules_to_save[adapter], wrapper.original_module
            yield l2_to_reference(map(_whole, trained.parameters()), map(_whole, original.parameters()))

    def _copied_squares(self) -> Iterator[Tensor]:
        for i, (module, name, reference) in enumerate(self._copied):
            parameter = getattr(module, name)
            if reference.device != parameter.device:
                reference = reference.to(parameter.device)
                self._copied[i] = (module, name, reference)
            yield l2_to_reference([_whole(parameter)], [_whole(reference)])


def _dora_square(layer: Any, adapter: str) -> Tensor:
    weight = transpose(_whole(dequantize_module_weight(layer.get_base_layer())), layer.fan_in_fan_out)
    A, B = _factors(layer, adapter)
    return dora_l2(weight, A, B, _whole(layer.lora_magnitude_vector[adapter].weight), layer.scaling[adapter])


def _has_magnitudes(layer: Any, adapter: str) -> bool:
    """DoRA on a linear layer, whose update is known; its variants for other layers derive from this one."""
    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any, list[str]]]:
    """(name, layer, its active adapters) for every LoRA layer with an active adapter.

    Layers are `LoraLayer`s, typed `Any` because PEFT types their weights as `Tensor | Module`.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            adapters = [a for a in module.active_adapters if a in module.lora_A or a in module.lora_embedding_A]
            if adapters:
                yield name, module, adapters


def _obstacle(model: nn.Module) -> str | None:
    """Why the distance of this model to its pretrained weights is not known, or None."""
    for name, module in model.named_modules():
        if isinstance(module, PeftModel):
            for adapter in module.active_adapters:
                init = getattr(module.peft_config[adapter], "init_lora_weights", True)
                if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
                    return f"init_lora_weights={init!r} of adapter {adapter!r} changes the pretrained weights"
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            return f"layer {name} is a {type(module).__name__}, not LoRA"
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            return f"layer {name} trains some of its weights through {type(module).__name__}"
    for name, layer, adapters in _adapted_layers(model):
        for adapter in adapters:
            if _has_magnitudes(layer, adapter):
                if len(adapters) > 1:
                    return f"layer {name} has several active adapters, and {adapter!r} of them is DoRA"
            elif adapter in layer.lora_variant:
                return f"layer {name} uses {type(layer.lora_variant[adapter]).__name__}, whose update is not s B A"
            if not _is_factored(layer, adapter) and not hasattr(layer, "get_delta_weight"):
                return f"layer {name} of type {type(layer).__name__} cannot tell its update"
    return None


def _trained_in_place(model: nn.Module, saved: list[ModulesToSaveWrapper]) -> list[tuple[nn.Module, str]]:
    """(module, parameter name) of trainable weights that are no adapter's, each parameter once."""
    seen = {id(p) for wrapper in saved for p in wrapper.parameters()}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            own = module.adapter_layer_names
            seen |= {id(p) for name, p in module.named_parameters() if name.split(".")[0] in own}
    found = []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                found.append((module, name))
    return found


def _is_factored(layer: Any, adapter: str) -> bool:
    """Whether the update is one product s B A of matrices: not so for convolutions and stacked experts."""
    if adapter in layer.lora_embedding_A:
        return True
    return isinstance(layer.lora_A[adapter], nn.Linear) and getattr(layer, "num_experts", 1) == 1


def _joint_factors(layer: Any, adapters: list[str]) -> tuple[Tensor, Tensor, float]:
    """A, B and s such that s B A is the sum of the adapters' updates: sum_i s_i B_i A_i = [s_1 B_1, ...] [A_1; ...]."""
    pairs = [_factors(layer, adapter) for adapter in adapters]
    if len(pairs) == 1:
        return *pairs[0], float(layer.scaling[adapters[0]])
    scaled_B = [layer.scaling[adapter] * B for adapter, (_, B) in zip(adapters, pairs, strict=True)]
    return torch.cat([A for A, _ in pairs]), torch.cat(scaled_B, dim=1), 1.0


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    if adapter in layer.lora_embedding_A:
        return _whole(layer.lora_embedding_A[adapter]), _whole(layer.lora_embedding_B[adapter])
    return _whole(layer.lora_A[adapter].weight), _whole(layer.lora_B[adapter].weight)


def _whole(weight: Tensor) -> Tensor:
    """A weight that processes hold in parts, whole. Sums of parts give right numbers and gradients cut otherwise than
    the weight, which FSDP then cannot add its own to.
    """
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _scaled_biases(layer: Any, adapters: list[str]) -> list[Tensor]:
    """What `lora_bias` adds to the layer's bias, of each adapter that has it."""
    return [
        layer.scaling[adapter] * _whole(layer.lora_B[adapter].bias)
        for adapter in adapters
        if adapter in layer.lora_B and layer.lora_B[adapter].bias is not None
    ]


def _factors_and_biases(layer: Any, adapters: list[str]) -> Iterator[Tensor]:
    for adapter in adapters:
        yield from _factors(layer, adapter)
        if adapter in layer.lora_B and layer.lora_B[adapter].bias is not None:
            yield _whole(layer.lora_B[adapter].bias)
