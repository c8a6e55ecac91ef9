"""
What the parser of TensorRT 8.2 wants, on a machine without TensorRT: `lower` rewrites a graph of opset 20 in the words
of opset 13, `rules` refuses whatever the device's parser would refuse.
"""
