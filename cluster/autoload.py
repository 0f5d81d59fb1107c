"""The library of NPUs, which torch loads by itself, and cannot be imported if that fails.

Loads no torch, so that it can be asked about a torch that does not load.
"""

import re

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""0 keeps torch from loading libraries of other devices when it is imported."""
LIBRARY = "torch_npu"
_RAISED = re.compile(r"^(?:ImportError|OSError|RuntimeError): (.+)$", re.MULTILINE)


def why_torch_fails(error: BaseException | str) -> str | None:
    """Why torch cannot be imported, and what to do, if that library is the reason; else none.

    Of what the import raised, or of the traceback that it printed.
    """
    if isinstance(error, str):
        if AUTOLOAD not in error:
            return None
        causes = [one for one in _RAISED.findall(error) if AUTOLOAD not in one]
        cause = causes[-1] if causes else "it does not say why"
    else:
        if AUTOLOAD not in str(error):
            return None
        cause = str(error.__cause__ or "it does not say why")
    return (
        f"{LIBRARY} is installed and cannot be loaded ({cause.splitlines()[0]}), and torch with "
        f"it, for CANN is not on this machine, or not set up; source CANN's set_env.sh, or set "
        f"{AUTOLOAD}=0 to go without NPUs"
    )
