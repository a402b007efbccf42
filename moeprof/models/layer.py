"""What is known of an MoE layer before anything runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """What is known of an MoE layer before anything runs. FLOPs are 2 per multiplication."""

    name: str  # the router's qualified name, "model.layers.0.mlp.gate"
    block: str  # "model.layers.0.mlp"; "" where the model itself is the block
    num_experts: int
    top_k: int | None  # None where neither router, block nor configuration says
    hidden_size: int | None
    router_flops: int | None  # per token: 2 * elements of the router's matrices (2 H E)
    expert_flops: int | None  # per selected expert (6 H I); None: unknown, or not all alike
    shared_flops: int | None  # per token: shared experts and their gate
    router_bytes: int
    expert_bytes: int | None  # all parameters of one expert; None: unknown, or not all alike
    shared_bytes: int
    dense: bool = False  # every expert runs for every token, selected or not (Llama 4)
    slot_flops: list[int] | None = None  # of each expert, where they differ
    call_flops: int = 0  # per call: adapters multiplied out and added to all experts (peft)
    unknown: str = ""  # why a size is None
