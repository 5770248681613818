"""Importer that converts ONNX models to torch, so that attacks can use gradients. The outputs of each import are
compared with onnxruntime.
"""
