"""The model of a process that runs clients: a frozen backbone with an adapter. Ours."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import nn

from droppeft import seeds
from droppeft.adapters.attach import attach, detach
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors, trainable_by_layer
from droppeft.data.cache import cache_dir
from droppeft.data.tokens import TokenRows
from droppeft.layer_dropout import Calibration, find_blocks
from droppeft.messages.instruction import AdapterSpec, LocalTraining
from droppeft.messages.tensors import Layout, Tensors, flatten
from droppeft.models.bf16_products import use_fp32_products
from droppeft.models.hardware import bf16_instructions
from droppeft.models.loading import Backbone
from droppeft.models.offloading import OffloadedWeights
from droppeft.models.quantization import on_device
from droppeft.tasks.task import Task
from droppeft.training.calibrating import Progress, calibrate
from droppeft.training.loop import Trainable


class ClientModel:
    """A frozen backbone with one adapter attached at a time.

    All clients of a process share it. A client has adapter tensors of its own, but no copy of the
    model.

    Args:
        backbone: the pretrained model.
        task: what it learns.
        accelerator: name of the torch device.
        seed: the run's seed, from which initial values follow.
        offload: whether the layers' frozen weights are held in a file. :meth:`load_layers` then
            brings the ones that are needed into memory.

    Attributes:
        model: the backbone with the adapter of the last :meth:`attach`.
        parameters: its trainable parameters by layer.
        blocks: its L layers.
        task: batches, loss and metrics.
        device: the torch device.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        accelerator: str,
        seed: int,
        *,
        offload: bool = False,
    ) -> None:
        self._backbone = backbone
        self._adapter_task = task.adapter_task
        self._seed = seeds.seed_for(seed, purpose="adapter")
        self._spec: AdapterSpec | None = None
        self._fresh: dict[AdapterSpec, Tensors] = {}
        self.device = torch.device(accelerator)
        self._offloaded: OffloadedWeights | None = None
        if offload:
            self.model = backbone.model
            _, blocks = find_blocks(self.model)
            folder = cache_dir() / "offloaded"
            self._offloaded = OffloadedWeights(self.model, blocks, self.device, folder)
        else:
            self.model = on_device(backbone.model, self.device)
        self.parameters: Parameters = {}
        self.blocks: tuple[nn.Module, ...] = ()
        self.task = task.on(backbone.inputs, int(backbone.tokenizer.pad_token_id), self.device)

    @property
    def weights_hash(self) -> str:
        """Hash of the backbone's weights."""
        return self._backbone.weights_hash

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the backbone."""
        return self._backbone.tokenizer

    @property
    def num_layers(self) -> int:
        """Number L of the backbone's layers."""
        return self._backbone.num_layers

    @property
    def is_offloading(self) -> bool:
        """Whether weights are offloaded to a file; without it :meth:`load_layers` does nothing."""
        return self._offloaded is not None

    def load_layers(self, layers: Collection[int] | None = None) -> None:
        """Bring the weights of these layers, or of all, into memory; the others may be released."""
        if self._offloaded is not None:
            self._offloaded.load_layers(range(self.num_layers) if layers is None else layers)

    def attach(self, spec: AdapterSpec) -> None:
        """Attach an adapter, unless it is attached already."""
        if spec != self._spec:
            self._change(spec)

    def trainable(self, parameters: Parameters) -> Trainable:
        """Return what the training loop needs in order to train these parameters."""
        return Trainable(self.model, self.blocks, parameters, self.task)

    def fresh_tensors(self, spec: AdapterSpec) -> Tensors:
        """Return the initial values of an adapter, which depend on the run's seed alone."""
        if spec not in self._fresh:
            self._change(spec)
        return self._fresh[spec]

    def layout(self, spec: AdapterSpec) -> Layout:
        """Return the names, layers and shapes of an adapter's trainable tensors."""
        return {name: (key, array.shape) for key, name, array in flatten(self.fresh_tensors(spec))}

    def calibrate(
        self,
        spec: AdapterSpec,
        table: TokenRows,
        settings: LocalTraining,
        progress: Progress = lambda done, of: None,
    ) -> Calibration:
        """Measure what each layer is worth, with the initial values of an adapter.

        Args:
            spec: of the adapter.
            table: tokenised rows in random order, all of which are used.
            settings: batch size, precision and checkpointing.
            progress: called with the number of passes that are done, and that of all.

        Raises:
            DroppeftError: as :func:`~droppeft.training.calibrating.calibrate`.
        """
        fresh = self.fresh_tensors(spec)
        self.attach(spec)
        self.load_layers()
        set_tensors(self.parameters, fresh)
        try:
            return calibrate(
                self.trainable(self.parameters),
                table,
                np.arange(len(table)),
                settings,
                fit_head=bool(self._backbone.new_modules),
                progress=progress,
            )
        finally:
            set_tensors(self.parameters, fresh)  # a new head was trained

    def _change(self, spec: AdapterSpec) -> None:
        if self._spec is not None:
            self.model, self._spec = detach(self.model), None
        base = self._backbone
        model = attach(
            self.model, spec, base.blocks_path, self._seed, base.new_modules, self._adapter_task
        )
        if self._offloaded is None:
            model = model.to(self.device)
        else:
            self._offloaded.move_rest(model)
        if self.device.type == "cpu" and bf16_instructions() is None and _holds_bf16(model):
            use_fp32_products(model)
        path, self.blocks = find_blocks(model)
        self.parameters = trainable_by_layer(model, path)
        self.model, self._spec = model, spec
        self._fresh[spec] = get_tensors(self.parameters)


def _holds_bf16(model: nn.Module) -> bool:
    return any(value.dtype == torch.bfloat16 for value in model.parameters())
