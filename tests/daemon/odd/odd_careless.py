"""The reference backend, whose runs raise foreign exceptions for inputs it does not like."""

from edge_runtime.backends.reference import Reference, ReferenceModel


class Backend(Reference):
    name = "careless"

    def load(self, artifact, options):
        model = super().load(artifact, options)
        inner = model._run

        def run(inputs):
            if any(bool((array == 13).any()) for array in inputs.values()):
                raise ZeroDivisionError("thirteen")
            return inner(inputs)

        model._run = run
        assert isinstance(model, ReferenceModel)
        return model
