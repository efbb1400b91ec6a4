from tests.vllm.fixtures import tiny_model, vllm_python, vllm_replica

__all__ = ["tiny_model", "vllm_python", "vllm_replica"]
