"""ONNX onto torch: our own importer, checked against onnxruntime, so that gradients come without another converter."""

from holdfast.sources.onnx.opening import OnnxModel, open_onnx

__all__ = ["OnnxModel", "open_onnx"]
