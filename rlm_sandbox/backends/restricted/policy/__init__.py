"""What a restricted cell may say and reach: the language, the builtins and the modules.

Standard library and RestrictedPython only: the same files run in the host process and, as sources, in a killable guest.
"""
