"""Any PML loss, with or without HIER, in the trainer of sentence-transformers."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn
from transformers import TrainerCallback

from .losses import HIERLoss

__all__ = ["PMLLoss", "SaveLossCallback"]

_RAW = "embedding_before_normalization"


class PMLLoss(nn.Module):
    """A PML loss as a loss of ``SentenceTransformerTrainer``.

    If the model ends with a ``Normalize`` layer, the loss gets the embeddings before it. HIER needs their norms;
    cosine similarities do not change. Texts come in one column, and labels are integers. The batch sampler
    ``BatchSamplers.GROUP_BY_LABEL`` puts several texts of a label into a batch. In ``MatryoshkaLoss``, which cuts
    off columns, use losses without proxies.

    The trainer's optimizer gets the parameters of the loss too. ``learning_rate_mapping={"proxies": 1e-2}`` in the
    training arguments gives proxies a learning rate of their own. `SaveLossCallback` saves them with checkpoints.

    Args:
        model: the model to train.
        loss_func: a loss of PML, `MultipleLosses` for instance.
        frozen_neighbors: if ``True``, each `HIERLoss` finds neighbours by a frozen copy of ``model`` as it is now.

    Raises:
        RuntimeError: a loss with parameters in several processes, where nothing would synchronize them.

    Example::

        base = losses.ProxyAnchorLoss(num_classes=150, embedding_size=384)
        loss = PMLLoss(model, losses.MultipleLosses([base, HIERLoss(embedding_size=384)]))
        trainer = SentenceTransformerTrainer(model, args, dataset, loss=loss, callbacks=[SaveLossCallback(loss)])

    Source: https://sbert.net/docs/sentence_transformer/training_overview.html for what a loss is called with.
    """

    def __init__(
        self, model: SentenceTransformer, loss_func: nn.Module, *, frozen_neighbors: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(model, SentenceTransformer):
            raise TypeError(f"model must be a SentenceTransformer, got {type(model).__name__}")
        if not isinstance(loss_func, nn.Module):
            raise TypeError(f"loss_func must be a loss of pytorch_metric_learning, got {type(loss_func).__name__}")
        self._hier = [part for part in loss_func.modules() if isinstance(part, HIERLoss)]
        if frozen_neighbors and not self._hier:
            raise ValueError("frozen_neighbors needs a HIERLoss in loss_func, got none")
        if any(part.embedding_size is None for part in self._hier):  # the optimizer groups parameters by size
            with model.truncate_embeddings(None):  # training uses all columns
                size = model.get_embedding_dimension()
            raise ValueError(f"HIERLoss needs embedding_size={size}, that of the model, got None")
        # Not registered as submodules: the trainer must not train the copy.
        self._frozen = [copy.deepcopy(model).eval().requires_grad_(False)] if frozen_neighbors else []
        self.model, self.loss_func = model, loss_func

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch of tokenized texts."""
        if labels is None or len(sentence_features) != 1:
            raise ValueError(
                'PMLLoss needs a data set with one column of texts and an integer column "label", got '
                f"{len(sentence_features)} columns of texts and {'no labels' if labels is None else 'labels'}"
            )
        if dist.is_initialized() and dist.get_world_size() > 1 and [*self.loss_func.parameters()]:
            raise RuntimeError(
                "PMLLoss with proxies needs one process: nothing synchronizes their gradients; see examples/ddp.py"
            )
        features = dict(sentence_features[0])
        # The trainer may have wrapped the model, or replaced it.
        inner = next(part for part in self.model.modules() if isinstance(part, SentenceTransformer))
        self.loss_func.train(inner.training)  # the trainer evaluates in small batches
        last = [*inner.children()][-1]
        with ExitStack() as stack:
            if isinstance(last, Normalize) and last.module_input_name == "sentence_embedding":
                stack.enter_context(last.register_forward_pre_hook(_keep_raw))
            found = self.model(sentence_features[0])  # adds to the features, which AdaptiveLayerLoss needs
            width = found["sentence_embedding"].shape[1]  # MatryoshkaLoss cuts off columns
            embeddings = found.get(_RAW, found["sentence_embedding"])[:, :width]
            for frozen in self._frozen:
                with torch.no_grad():
                    neighbors = frozen.to(embeddings.device)(features)["sentence_embedding"]
                for part in self._hier:
                    stack.enter_context(part.neighbors_from(neighbors))
            loss: Tensor = self.loss_func(embeddings, labels.view(-1))
            return loss


class SaveLossCallback(TrainerCallback):  # type: ignore[misc]
    """Saves the proxies of a loss as loss.pt with each checkpoint, and loads them when the training is resumed.

    Checkpoints must stay in the output folder of the training arguments. ``load_best_model_at_end`` does not load
    proxies; ``callback.loss_funcs.load_state_dict(torch.load("best/loss.pt")["loss_funcs"])`` does.

    Args:
        loss: the ``loss`` of the trainer, one or a dict, each a `PMLLoss` or a loss around one.

    Raises:
        ValueError: the training is resumed from another folder, or from a checkpoint without loss.pt.
    """

    def __init__(self, loss: nn.Module | Mapping[str, nn.Module]) -> None:
        losses = loss.values() if isinstance(loss, Mapping) else [loss]
        parts = (part for own in losses for part in own.modules() if isinstance(part, PMLLoss))
        self.loss_funcs = nn.ModuleList(part.loss_func for part in parts)

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        file = self._file(args, state)
        if state.is_world_process_zero and file.parent.exists():  # a search of hyperparameters has other folders
            torch.save({"loss_funcs": self.loss_funcs.state_dict(), "sum of the model": _sum(model)}, file)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if not state.global_step:
            return
        file = self._file(args, state)
        saved = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
        if saved is None or not np.isclose(saved["sum of the model"], _sum(model), rtol=1e-9, equal_nan=True):
            raise ValueError(
                f"training is resumed from step {state.global_step}, but {file} is missing or of another run; "
                "resume in the output_dir that was trained in, with SaveLossCallback from the start"
            )
        self.loss_funcs.load_state_dict(saved["loss_funcs"])

    @staticmethod
    def _file(args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "loss.pt")


def _sum(model: nn.Module) -> float:
    return sum(float(parameter.detach().double().sum()) for parameter in model.parameters())


def _keep_raw(module: nn.Module, inputs: tuple[dict[str, Any]]) -> None:
    inputs[0][_RAW] = inputs[0]["sentence_embedding"]
