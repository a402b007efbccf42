"""What moeprof knows of models: where their MoE layers are, and how to read them."""
