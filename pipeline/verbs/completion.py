"""`ingot completion SHELL`: what makes the shell complete verbs, recipes and options."""

import argparse

from configs.reading import shipped_recipes

_BASH = """\
_ingot() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$(_ingot_options "$verb")" -- "$word")) ;;
        @*) COMPREPLY=($(compgen -P @ -G "${{word#@}}*.toml")) ;;
        *) COMPREPLY=($(compgen -W "{recipes}" -- "$word") $(compgen -f -- "$word")) ;;
    esac
}}
_ingot_options() {{
    case "$1" in
{options}
    esac
}}
complete -o filenames -F _ingot ingot
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
_FISH_VERB = "complete -c ingot -n __fish_use_subcommand -f -a {verb} -d {help}\n"
_FISH_RECIPE = "complete -c ingot -n '__fish_seen_subcommand_from run plan diff' -a '{recipes}'\n"
_FISH_OPTION = "complete -c ingot -n '__fish_seen_subcommand_from {verb}' -l {option}\n"


def completion(args: argparse.Namespace) -> int:
    """Print a script for the shell to read, as `source <(ingot completion bash)`."""
    options: dict[str, list[str]] = args.options
    recipes = " ".join(shipped_recipes())
    if args.shell == "fish":
        print(_fish(args.helps, options, recipes), end="")
        return 0
    cases = "\n".join(
        f'        {verb}) echo "{" ".join(found)}" ;;' for verb, found in options.items()
    )
    script = _BASH.format(verbs=" ".join(options), recipes=recipes, options=cases)
    print((_ZSH if args.shell == "zsh" else "") + script, end="")
    return 0


def _fish(helps: dict[str, str], options: dict[str, list[str]], recipes: str) -> str:
    lines = [_FISH_VERB.format(verb=v, help=repr(helps[v])) for v in options]
    lines.append(_FISH_RECIPE.format(recipes=recipes))
    lines += [
        _FISH_OPTION.format(verb=verb, option=option.removeprefix("--"))
        for verb, found in options.items()
        for option in found
        if option.startswith("--")
    ]
    return "".join(lines)
