"""Importer that converts ONNX models to torch, which provides gradients. Each import is compared with onnxruntime."""
