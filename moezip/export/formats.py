"""What ``moezip export --to`` and the recipes' ``export: {to: ...}`` know."""

SAFETENSORS, COMPRESSED, GPTQ, GGUF = "safetensors", "compressed-tensors", "gptq", "gguf"
FORMATS = {
    SAFETENSORS: "plain numbers, which every loader reads",
    COMPRESSED: "the same codes as compressed-tensors names them, for vLLM and SGLang",
    GPTQ: "the same codes as AutoGPTQ and GPTQModel lay them out, 4 or 8 bits",
    GGUF: "llama.cpp's own file",
}
