"""The keys of local training, and of settings that hold until a step."""

from typing import Any, Literal

from pydantic import Field, model_validator

from photon.config.section import Section

#: Of products of float32 matrices, in the words of `torch.set_float32_matmul_precision`.
MatmulPrecision = Literal["highest", "high", "medium"]


class TrainingSection(Section):
    """Local training, the same on every silo."""

    batch_size: int = Field(ge=1, description="Sequences per local step.")
    micro_batch_size: int | Literal["auto"] | None = Field(
        description="Sequences per forward pass, gradients accumulated; null: the whole batch; auto: probed "
        "once a run."
    )
    clip_norm: float | None = Field(gt=0, description="Bound on the global gradient norm; null: none.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        description="Of forward and backward; auto: decided once a run, by the model's own step on a CPU."
    )
    attention: Literal["auto", "sdpa", "products"] = Field(
        "auto", description="By torch's one operation or matrix products; auto: decided as precision is."
    )
    matmul_precision: MatmulPrecision = Field(
        "highest",
        description="Of products of float32 matrices, as torch.set_float32_matmul_precision has it: highest "
        "is float32; high (TF32) and medium (bfloat16) round the factors where the hardware gains by it.",
    )
    residual: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Format of what passes from block to block while precision is bf16. bf16 takes half the "
        "memory, and has sharded devices (parallel=fsdp) send each other parameters in bf16.",
    )
    compile: bool = Field(description="Use torch.compile; block by block if parallel=fsdp.")
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = Field(
        "default",
        description="As torch.compile has it: max-autotune-no-cudagraphs times several kernels for each "
        "product, which takes minutes at the start.",
    )
    activation_checkpointing: bool = Field(description="Recompute activations to save memory.")
    threads: int | None = Field(ge=1, le=1024, description="CPU threads; null: a fair share of the cores.")
    device: str = Field(description="auto, cpu, cuda or cuda:N.")
    processes: int = Field(ge=1, description="Devices of one silo that train together.")
    parallel: Literal["ddp", "fsdp"] = Field(description="How the devices of one silo share the work.")
    machines: int = Field(
        1,
        ge=1,
        le=1024,
        description="Machines of one silo that train together, each with as many of `processes`.",
    )
    rendezvous: str | None = Field(
        None,
        description="HOST:PORT of the first of them, where they meet; the others run `photon silo machine`.",
    )

    def narrows(self, precision: str) -> bool:
        """Return whether the residual stream is in bfloat16 in a forward pass of this precision."""
        return self.residual == "bf16" and precision == "bf16"

    @model_validator(mode="after")
    def _possible(self) -> "TrainingSection":
        if self.residual == "bf16" and self.precision in ("fp32", "fp16"):
            raise ValueError(
                f"training.residual=bf16: the forward pass is in {self.precision}; set "
                "training.precision=bf16, or leave it out"
            )
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(
                f"training.compile_mode={self.compile_mode}: nothing is compiled; set training.compile=true"
            )
        if self.processes % self.machines:
            raise ValueError(
                f"training.machines={self.machines} does not divide training.processes={self.processes}; "
                "processes are those of all machines together"
            )
        if (self.machines > 1) != (self.rendezvous is not None):
            raise ValueError(
                "training.machines and training.rendezvous go together: above one machine, HOST:PORT of the "
                "first, where they meet"
            )
        return self


class TransitionSection(Section):
    """Warm up with other settings of the local optimizer, and go over to the real ones at a global step."""

    step: int = Field(ge=1, description="Global step from which the settings below hold.")
    local_steps: int | None = Field(
        None,
        ge=1,
        description="Local steps of a round before the transition, in which each averages all groups of the "
        "sync plan (1: a synchronous warm-up); null: as after it.",
    )
    optimizer: dict[str, Any] = Field(
        {}, description="Arguments that the local optimizer has from then on, such as `betas`."
    )
    lr_scale: float = Field(1.0, gt=0, description="Factor of the learning rate from then on.")
    zero: list[str] = Field([], description="State groups of the local optimizer that are zeroed then.")
    reset_step: bool = Field(
        False, description="Also count the local optimizer's steps, which correct its bias, from 0 again."
    )

    @model_validator(mode="after")
    def _possible(self) -> "TransitionSection":
        if "_target_" in self.optimizer:
            raise ValueError("transition.optimizer._target_: the optimizer stays the run's; remove it")
        return self
