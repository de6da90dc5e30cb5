/* A client of Edge Runtime's frames in C99, for Linux. Needs nothing but a C library.
 *
 * The protocol is docs/protocol.md. One connection, one request at a time, one thread at a time.
 * Every function that returns int returns 0 or one of the codes below; edge_error() then says more.
 */
#ifndef EDGE_CLIENT_H
#define EDGE_CLIENT_H

#include <stddef.h>
#include <stdint.h>

enum {
    EDGE_OK = 0,
    EDGE_CLOSED = -1,    /* cannot connect, or the connection broke: connect again, ask again */
    EDGE_TIMEOUT = -2,   /* no answer in time; the connection is closed */
    EDGE_REFUSED = -3,   /* the server answered with an error: edge_error_code() is its code */
    EDGE_MALFORMED = -4, /* the answer is not of this protocol; the connection is closed */
    EDGE_INVALID = -5    /* the arguments are wrong; nothing was sent */
};

enum { EDGE_DIMENSIONS_MAX = 16, EDGE_TENSORS_MAX = 32, EDGE_NAME_MAX = 256, EDGE_REGIONS_MAX = 16 };

/* A tensor: C order, little-endian. Where `region` is -1, `data` points to its bytes; otherwise the
 * bytes are at `offset` of that region and `data` is not read. */
typedef struct {
    char name[EDGE_NAME_MAX];
    char datatype[8]; /* "FP32", "UINT8", ...: Open Inference Protocol names */
    int dimensions;
    int64_t shape[EDGE_DIMENSIONS_MAX];
    const void *data;
    size_t size; /* bytes */
    int region;
    size_t offset;
} edge_tensor;

typedef struct edge_client edge_client;

/* Connect to a socket. NULL: no memory, or nobody listens (errno says which). */
edge_client *edge_connect(const char *path);
void edge_close(edge_client *client);

/* The last failure: a sentence, the server's code ("overloaded", ...; "" if it was not the server),
 * and the seconds after which the server wants to be asked again (0: it did not say). */
const char *edge_error(const edge_client *client);
const char *edge_error_code(const edge_client *client);
double edge_retry_after_s(const edge_client *client);

/* Fill a tensor that travels in the frame. */
int edge_tensor_set(edge_tensor *tensor, const char *name, const char *datatype, int dimensions,
                    const int64_t *shape, const void *data, size_t size);

/* Make region `number` of this connection for `model`: shared memory of `size` bytes, mapped at
 * *memory until edge_close. */
int edge_region(edge_client *client, const char *model, int number, size_t size, void **memory,
                double timeout_s);

/* Whom the next requests are for (a user, a camera): while two versions share a model's traffic
 * (`edge-runtime split`), the same key is answered by the same one. At most 256 characters, without
 * quotes, backslashes and control characters; "": each request is decided by itself. */
int edge_routing_key(edge_client *client, const char *key);

/* Run a model.
 *
 * wanted: which outputs, by name; those with region >= 0 are written there (size: the room).
 *     NULL with wanted_count 0: all, in the frame.
 * outputs: filled; *outputs_count is its length before, and how many there are after. Their `data`
 *     is the client's and valid until the next call.
 */
int edge_infer(edge_client *client, const char *model, const edge_tensor *inputs, int inputs_count,
               const edge_tensor *wanted, int wanted_count, edge_tensor *outputs,
               int *outputs_count, double timeout_s);

#endif
