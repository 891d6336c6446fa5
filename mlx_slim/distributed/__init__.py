"""Several processes of one command, one a machine: what they agree on before they compute."""
