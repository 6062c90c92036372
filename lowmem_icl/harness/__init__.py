"""The tool as a model of lm-evaluation-harness: `lm-eval run --model lowmem-icl`."""
