"""Trains the bundled base model."""

from data.base_module import BaseDataModule
from lightning.pytorch.cli import LightningCLI
from train.base_module import BaseModule

if __name__ == "__main__":
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger
    LightningCLI(BaseModule, BaseDataModule, auto_configure_optimizers=False, save_config_callback=None,
        parser_kwargs={"fit": {"default_config_files": ["configs/base/default.yaml"]}},
        trainer_defaults=dict(callbacks=[ModelCheckpoint(dirpath="runs/base/checkpoints", save_last=True, every_n_train_steps=250, save_top_k=1, monitor=None), TQDMProgressBar(refresh_rate=50)],
        logger={"class_path":"lightning.pytorch.loggers.CSVLogger","init_args":{"save_dir":"runs/base","name":"","version":"csv"}}, log_every_n_steps=50))
