"""What the shell completes after ``python -m gatl``: groups, their choices, and settings.

Hydra answers what there is; its own scripts know programs and files, and no ``python -m``.
"""

import os
import sys
from collections.abc import Sequence

from gatl.errors import UserError

BASH = r"""_gatl() {
    local line=${COMP_LINE:0:COMP_POINT} word before="" choice choices
    local call='^[[:blank:]]*[^[:blank:]]+[[:blank:]]+-m[[:blank:]]+gatl[[:blank:]](.*)$'
    if [[ ! $line =~ $call ]]; then
        return  # another module, or a file: completed as files are
    fi
    IFS=$' \t\n' read -r -d '' -a choices < <(
        COMP_LINE="gatl ${BASH_REMATCH[1]}" "$1" -m gatl -sc query=bash 2> /dev/null
    )
    word=${line##*[[:blank:]]}
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then  # to bash, a word begins behind the =
        before="${word%=*}="
    fi
    COMPREPLY=()
    for choice in "${choices[@]}"; do  # no compgen -W, which runs what a file's name says
        if [[ $choice == "$word"* ]]; then
            COMPREPLY+=("$(printf %q "${choice#"$before"}")")
        fi
    done
}
complete -o nospace -o default -F _gatl python python3
"""
"""Defines and registers the function; what it does not know is completed as files are."""


def shell_completion(words: Sequence[str]) -> bool:
    """Print what ``-sc install=bash`` or ``-sc uninstall=bash`` asks for.

    Args:
        words: What stands behind ``-sc``.

    Returns:
        Whether that was all; False for ``query=bash``, which is Hydra's to answer.

    Raises:
        UserError: If it is none of these.
    """
    match list(words):
        case ["install=bash"]:
            sys.stdout.write(BASH)
        case ["uninstall=bash"]:
            sys.stdout.write("complete -r python python3\n")
        case ["query=bash"] if "COMP_LINE" in os.environ:
            return False
        case _:
            raise UserError(
                'Completion is there for bash alone: eval "$(python -m gatl -sc install=bash)".'
            )
    return True
