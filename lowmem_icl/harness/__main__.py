"""`python -m lowmem_icl.harness run …`: lm-evaluation-harness's command, with the model registered first."""

from lm_eval.__main__ import cli_evaluate

from lowmem_icl.harness.registration import register

if __name__ == "__main__":
    register()
    cli_evaluate()
