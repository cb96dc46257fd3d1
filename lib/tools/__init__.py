"""What drives the study from outside: the command line, the notebooks' driver, and the pages of results.

Nothing in lib imports this room. Start with cli.py: every command, and the function that it calls.

cli            python -m lib COMMAND
notebooks      runs the notebooks in order, keeps their canonical form, answers their exercises
profiles       parameters from notebooks/profiles and from the command line, checked
harvest_parts  a harvest without its notebook, whole or shared out among jobs
compare        has any number moved since the last commit?
publish        tables of README.md and docs/, and the study as HTML, from docs/templates
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["cli", "publish"],
    submod_attrs={
        "notebooks": ["canonicalise", "exercises", "parameters_for", "parameters_of", "run_all"],
        "profiles": ["read_profile"],
        "harvest_parts": ["harvest_for"],
        "compare": ["check_folder"],
    },
)
