"""Distillation of transformer encoders by self-attention relations (MiniLM, MiniLMv2)."""
