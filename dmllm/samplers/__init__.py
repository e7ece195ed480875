"""How a canvas is denoised: processes by name, each a `Process`."""

from dmllm.registry import Table

PROCESSES = Table("process", {"absorbing": "dmllm.samplers.absorbing:ABSORBING"})
