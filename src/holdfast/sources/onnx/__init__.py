"""Importer from ONNX to torch, checked against onnxruntime, which provides gradients without another converter."""
