"""Records of TensorFlow's format, tf.train.Example protocol buffers, without TensorFlow."""

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FIELD = descriptor_pb2.FieldDescriptorProto
KINDS = {"bytes_list": FIELD.TYPE_BYTES, "float_list": FIELD.TYPE_FLOAT, "int64_list": FIELD.TYPE_INT64}


@cache
def example_type() -> Any:
    """Return the class of the message: features by name, each a list of bytes, float32 or int64."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="example", syntax="proto3")
    example, features, feature = (file.message_type.add(name=name) for name in ("Example", "Features", "Feature"))
    one, many, message = FIELD.LABEL_OPTIONAL, FIELD.LABEL_REPEATED, FIELD.TYPE_MESSAGE
    example.field.add(name="features", number=1, label=one, type=message, type_name=".example.Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=FIELD.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=message, type_name=".example.Feature")
    features.field.add(name="feature", number=1, label=many, type=message, type_name=".example.Features.FeatureEntry")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(KINDS.items(), 1):
        values = file.message_type.add(name=name)
        values.field.add(name="value", number=1, label=many, type=kind)
        feature.field.add(
            name=name, number=number, label=one, type=message, type_name=f".example.{name}", oneof_index=0
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("example.Example"))


def parse_example(data: bytes) -> dict[str, Any]:
    """Return the features of a record by name: bytes, float or int, or a list of them if there is not exactly one.

    Raises ValueError if the bytes are not an Example.
    """
    message = example_type()()
    try:
        message.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, and UnicodeDecodeError of names
        raise ValueError(f"the record is not a tf.train.Example: {error}") from error
    row = {}
    for name, feature in message.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = [] if kind is None else list(getattr(feature, kind).value)
        row[name] = values[0] if len(values) == 1 else values
    return row
