"""Trains the bundled base model: ``python train/base.py fit``; ``export`` writes the official checkpoint format."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from data.base_data import BaseDataModule
from data.disk import check_writable
from models import LLaDAConfig, LLaDAModelLM
from models.checkpoint import replacing
from models.errors import InputError, first_line
from models.predictor import described
from train.base_module import BaseModule
from train.cli import run
from train.folder import load_checkpoint, made_by

FIELDS = ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "max_sequence_length", "vocab_size", "rope_theta")
"""What a checkpoint says of the network, and the export needs."""


def export(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    """Writes a trained base model as ``config.json``, ``model.safetensors`` and tokenizer files.

    The folder appears in full or not at all; an older export under the same name is replaced.

    Args:
        checkpoint: Checkpoint written by ``fit``.
        tokenizer: Folder of the tokenizer it was trained with.
        out: Folder to write.

    Raises:
        InputError: The checkpoint or tokenizer cannot be read, they do not belong together, or ``out`` holds something
            else.
    """
    check_writable("out", out)
    content = load_checkpoint(checkpoint)
    try:
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError("tokenizer", f"{tokenizer} ({first_line(error)})", "a tokenizer's folder") from error
    settings = content.get("hyper_parameters", {})
    if missing := [name for name in FIELDS if name not in settings]:
        raise InputError(f"checkpoint {checkpoint}", f"no {missing[0]}", "one that `train/base.py fit` wrote")
    if len(words) != settings["vocab_size"]:
        raise InputError(
            f"tokenizer {tokenizer}", f"{len(words)} tokens", f"{settings['vocab_size']}, as in {checkpoint}"
        )
    if out.exists():
        if not (out / "config.json").is_file():
            raise InputError("out", f"{out}, which is no exported model", "a new folder or an earlier export")
        described(out / "config.json")  # replacing means deleting: a base model only
    model = LLaDAModelLM(
        LLaDAConfig(
            **{name: settings[name] for name in FIELDS},
            n_kv_heads=settings["n_heads"],
            embedding_size=settings["vocab_size"],
            mask_token_id=words.mask_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    prefix = "model."  # the attribute of BaseModule that holds the network
    with made_by("train/base.py", checkpoint):
        model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in content["state_dict"].items()})
    disable_progress_bar()
    with replacing(out.absolute()) as aside:
        model.save_pretrained(aside)
        words.save_pretrained(aside)
    print(f"step {content['global_step']} of {checkpoint} is in {out}")


def precision() -> str:
    """bf16 autocast where the device has instructions for it; elsewhere it is several times slower than fp32."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if fast else "32-true"


if __name__ == "__main__":
    run(
        "base",
        BaseModule,
        BaseDataModule,
        subcommands=("fit", "validate"),
        verbs={"export": export},
        links=[("data.vocab_size", "model.vocab_size"), ("model.max_sequence_length", "data.longest")],
        checkpoint={"every_n_train_steps": 250},
        callbacks=lambda folder: [EMAWeightAveraging(decay=0.995)],
        precision=precision(),
    )
