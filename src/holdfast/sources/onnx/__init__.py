"""ONNX onto torch: our own importer, checked against onnxruntime, so that gradients come without another converter."""
