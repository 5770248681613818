"""Importer from ONNX to torch, which provides gradients. Each import is compared with onnxruntime."""
