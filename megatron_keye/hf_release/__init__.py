"""What an exported folder carries beside its weights, so that `transformers` alone can run it.

The model (`configuration_`, `attention_`, `vision_`, `modeling_keye_vl2.py`) is a second implementation of Keye-VL-2.0
in plain torch: eager and short, written from the definition, an oracle for this package's own model. It imports nothing
of this stack. The processor (`processing_keye_vl2.py`) is keye_data's own; shipping.py copies its sources along.
"""
