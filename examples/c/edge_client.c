/* See edge_client.h and docs/protocol.md. From top to bottom: bytes, JSON, sockets, requests. */
#define _GNU_SOURCE /* memfd_create, file seals */
#include "edge_client.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors travel little-endian: this client does not swap them"
#endif

enum {
    PREFIX_SIZE = 32,
    HEADER_SIZE_MAX = 65536,
    KIND_INFER = 0x01,
    KIND_REGION_ADD = 0x04,
    KIND_ERROR = 0xFF,
    RESPONSE = 0x80
};
static const size_t BODY_SIZE_MAX = (size_t)256 << 20; /* an answer's; larger ones by region */

struct edge_client {
    int fd; /* -1: closed */
    uint64_t next_id;
    char *buffer; /* the last answer: header, a zero byte, body */
    size_t capacity;
    size_t header_size;
    size_t body_size;
    void *regions[EDGE_REGIONS_MAX];
    size_t region_sizes[EDGE_REGIONS_MAX];
    char routing_key[EDGE_NAME_MAX + 1];
    char error[512];
    char code[32];
    double retry_after_s;
};

static int fail(edge_client *client, int result, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(client->error, sizeof client->error, format, arguments);
    va_end(arguments);
    client->code[0] = 0;
    client->retry_after_s = 0;
    if (result != EDGE_INVALID && result != EDGE_REFUSED && client->fd >= 0) {
        close(client->fd); /* something may still be under way on it */
        client->fd = -1;
    }
    return result;
}

/* ---- bytes ---- */

static void put(unsigned char *to, uint64_t value, int size)
{
    for (int i = 0; i < size; i++)
        to[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t get(const unsigned char *from, int size)
{
    uint64_t value = 0;
    for (int i = 0; i < size; i++)
        value |= (uint64_t)from[i] << (8 * i);
    return value;
}

/* ---- JSON, read: a cursor that only moves forward; NULL once anything is wrong ---- */

static const char *space(const char *at)
{
    while (at && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r'))
        at++;
    return at;
}

/* After a string; its content to `out` if that is not NULL (cut at `size`, escapes undone; what is
 * not ASCII after \u becomes '?'). */
static const char *string(const char *at, char *out, size_t size)
{
    size_t used = 0;
    at = space(at);
    if (!at || *at++ != '"')
        return NULL;
    for (; *at != '"'; at++) {
        char c = *at;
        if ((unsigned char)c < 0x20)
            return NULL;
        if (c == '\\') {
            static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
            const char *found = *++at ? strchr(from, *at) : NULL;
            if (found) {
                c = to[found - from];
            } else if (*at == 'u') {
                int value = 0;
                for (int i = 0; i < 4; i++) {
                    const char *digits = "0123456789abcdef";
                    const char *digit = *++at ? strchr(digits, *at | 0x20) : NULL;
                    if (!digit)
                        return NULL;
                    value = value * 16 + (int)(digit - digits);
                }
                c = value > 0 && value < 0x80 ? (char)value : '?';
            } else {
                return NULL;
            }
        }
        if (out && used + 1 < size)
            out[used++] = c;
    }
    if (out && size)
        out[used] = 0;
    return at + 1;
}

static const char *skip(const char *at, int depth)
{
    at = space(at);
    if (!at || depth > 32)
        return NULL;
    if (*at == '"')
        return string(at, NULL, 0);
    if (*at == '{' || *at == '[') {
        char end = *at == '{' ? '}' : ']';
        int object = *at == '{';
        at = space(at + 1);
        if (at && *at == end)
            return at + 1;
        while (at) {
            if (object) {
                at = space(string(at, NULL, 0));
                if (!at || *at++ != ':')
                    return NULL;
            }
            at = space(skip(at, depth + 1));
            if (!at || (*at != ',' && *at != end))
                return NULL;
            if (*at++ == end)
                return at;
        }
        return NULL;
    }
    size_t length = strcspn(at, ",]} \n\t\r");
    return length ? at + length : NULL;
}

/* Where the value of `key` begins in the object at `at`; NULL: no such key, or no object. */
static const char *member(const char *at, const char *key)
{
    at = space(at);
    if (!at || *at++ != '{')
        return NULL;
    for (;;) {
        char name[64];
        at = space(string(at, name, sizeof name));
        if (!at || *at++ != ':')
            return NULL;
        if (!strcmp(name, key))
            return space(at);
        at = space(skip(at, 0));
        if (!at || *at++ != ',')
            return NULL;
    }
}

/* The first element of the array at `at`, or the one after `at`; NULL: there is none. */
static const char *first(const char *at)
{
    at = space(at);
    if (!at || *at++ != '[')
        return NULL;
    at = space(at);
    return *at == ']' ? NULL : at;
}

static const char *next(const char *at)
{
    at = space(skip(at, 0));
    return at && *at == ',' ? space(at + 1) : NULL;
}

/* A whole number of 0 to 2^53; false if it is none. */
static int number(const char *at, uint64_t *value)
{
    char *end;
    if (!at || *at < '0' || *at > '9')
        return 0;
    errno = 0;
    *value = strtoull(at, &end, 10);
    return !errno && *value <= (uint64_t)1 << 53 && *end != '.' && *end != 'e' && *end != 'E';
}

/* ---- JSON, written ---- */

typedef struct {
    char data[HEADER_SIZE_MAX];
    size_t size;
    int bad; /* too long, or a name that would need escapes */
} text;

static void add(text *to, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(to->data + to->size, sizeof to->data - to->size, format, arguments);
    va_end(arguments);
    if (size < 0 || (size_t)size >= sizeof to->data - to->size)
        to->bad = 1;
    else
        to->size += (size_t)size;
}

static void add_name(text *to, const char *key, const char *name)
{
    for (const char *at = name; *at; at++)
        if (*at == '"' || *at == '\\' || (unsigned char)*at < 0x20)
            to->bad = 1;
    add(to, "\"%s\":\"%s\"", key, name);
}

static void add_place(text *to, const edge_tensor *tensor)
{
    add(to, "\"parameters\":{\"shared_memory_region\":%d,\"shared_memory_offset\":%zu,"
            "\"shared_memory_byte_size\":%zu}", tensor->region, tensor->offset, tensor->size);
}

static void pad(text *to)
{
    while (to->size % 32 && !to->bad)
        add(to, " ");
}

/* ---- the socket ---- */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int wait_until(edge_client *client, short events, uint64_t deadline_ns)
{
    for (;;) {
        uint64_t now = now_ns();
        uint64_t left_ms = now < deadline_ns ? (deadline_ns - now) / 1000000 + 1 : 0;
        struct pollfd poll_fd = {client->fd, events, 0};
        int ready = poll(&poll_fd, 1, left_ms > 1000000000 ? 1000000000 : (int)left_ms);
        if (ready > 0)
            return EDGE_OK;
        if (ready == 0)
            return fail(client, EDGE_TIMEOUT, "no answer in time");
        if (errno != EINTR)
            return fail(client, EDGE_CLOSED, "poll: %s", strerror(errno));
    }
}

static int send_all(edge_client *client, const void *data, size_t size, int fd_beside,
                    uint64_t deadline_ns)
{
    const char *at = data;
    while (size) {
        struct iovec piece = {(void *)(uintptr_t)at, size};
        union {
            struct cmsghdr header;
            char space[CMSG_SPACE(sizeof(int))];
        } beside;
        struct msghdr message;
        memset(&message, 0, sizeof message);
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        if (fd_beside >= 0) {
            memset(&beside, 0, sizeof beside);
            message.msg_control = &beside;
            message.msg_controllen = sizeof beside.space;
            struct cmsghdr *control = CMSG_FIRSTHDR(&message);
            control->cmsg_level = SOL_SOCKET;
            control->cmsg_type = SCM_RIGHTS;
            control->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(control), &fd_beside, sizeof(int));
        }
        ssize_t sent = sendmsg(client->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            at += sent;
            size -= (size_t)sent;
            fd_beside = -1; /* it goes with the first byte */
        } else if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            int result = wait_until(client, POLLOUT, deadline_ns);
            if (result)
                return result;
        } else if (errno != EINTR) {
            return fail(client, EDGE_CLOSED, "send: %s", strerror(errno));
        }
    }
    return EDGE_OK;
}

/* `data` NULL: read and forget. */
static int receive_all(edge_client *client, void *data, size_t size, uint64_t deadline_ns)
{
    char *at = data;
    char sink[4096];
    while (size) {
        size_t piece = data || size < sizeof sink ? size : sizeof sink;
        ssize_t got = recv(client->fd, data ? at : sink, piece, MSG_DONTWAIT);
        if (got > 0) {
            at += data ? got : 0;
            size -= (size_t)got;
        } else if (got == 0) {
            return fail(client, EDGE_CLOSED, "the server closed the connection");
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            int result = wait_until(client, POLLIN, deadline_ns);
            if (result)
                return result;
        } else if (errno != EINTR) {
            return fail(client, EDGE_CLOSED, "recv: %s", strerror(errno));
        }
    }
    return EDGE_OK;
}

/* ---- requests ---- */

/* Read frames until the answer to `id`; it lies in client->buffer. */
static int receive_answer(edge_client *client, int kind, uint64_t id, uint64_t deadline_ns)
{
    for (;;) {
        unsigned char prefix[PREFIX_SIZE];
        int result = receive_all(client, prefix, sizeof prefix, deadline_ns);
        if (result)
            return result;
        int answered = prefix[5];
        size_t header_size = (size_t)get(prefix + 8, 4);
        size_t body_size = (size_t)get(prefix + 12, 4);
        uint64_t answered_id = get(prefix + 16, 8);
        if (memcmp(prefix, "EDGE\1", 5) || prefix[7] || header_size > HEADER_SIZE_MAX ||
            body_size > BODY_SIZE_MAX)
            return fail(client, EDGE_MALFORMED, "the server's answer is not a frame");
        if (answered_id != id && !(answered_id == 0 && answered == KIND_ERROR)) {
            result = receive_all(client, NULL, header_size + body_size, deadline_ns);
            if (result)
                return result;
            continue;
        }
        if (header_size + 1 + body_size > client->capacity) {
            char *grown = realloc(client->buffer, header_size + 1 + body_size);
            if (!grown)
                return fail(client, EDGE_CLOSED, "no memory for an answer");
            client->buffer = grown;
            client->capacity = header_size + 1 + body_size;
        }
        result = receive_all(client, client->buffer, header_size, deadline_ns);
        client->buffer[header_size] = 0;
        if (!result)
            result = receive_all(client, client->buffer + header_size + 1, body_size, deadline_ns);
        if (result)
            return result;
        client->header_size = header_size;
        client->body_size = body_size;
        if (answered == KIND_ERROR) {
            const char *retry = member(client->buffer, "retry_after_s");
            char message[400] = "", code[sizeof client->code] = "internal";
            string(member(client->buffer, "message"), message, sizeof message);
            string(member(client->buffer, "code"), code, sizeof code);
            fail(client, EDGE_REFUSED, "%s: %s", code, message);
            memcpy(client->code, code, sizeof code);
            client->retry_after_s = retry ? strtod(retry, NULL) : 0;
            return EDGE_REFUSED;
        }
        if (answered != (kind | RESPONSE))
            return fail(client, EDGE_MALFORMED, "the server answered with kind %#x", answered);
        return EDGE_OK;
    }
}

static int send_frame_start(edge_client *client, int kind, const text *header, size_t body_size,
                            int fd_beside, uint64_t deadline_ns)
{
    unsigned char prefix[PREFIX_SIZE] = {'E', 'D', 'G', 'E', 1};
    if (client->fd < 0)
        return fail(client, EDGE_CLOSED, "not connected");
    prefix[5] = (unsigned char)kind;
    put(prefix + 8, header->size, 4);
    put(prefix + 12, body_size, 4);
    put(prefix + 16, ++client->next_id, 8);
    put(prefix + 24, deadline_ns, 8);
    int result = send_all(client, prefix, sizeof prefix, fd_beside, deadline_ns);
    return result ? result : send_all(client, header->data, header->size, -1, deadline_ns);
}

edge_client *edge_connect(const char *path)
{
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return NULL;
    }
    strcpy(address.sun_path, path);
    edge_client *client = calloc(1, sizeof *client);
    if (!client)
        return NULL;
    client->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (client->fd < 0 || connect(client->fd, (struct sockaddr *)&address, sizeof address)) {
        int error = errno;
        edge_close(client);
        errno = error;
        return NULL;
    }
    return client;
}

void edge_close(edge_client *client)
{
    if (!client)
        return;
    if (client->fd >= 0)
        close(client->fd);
    for (int i = 0; i < EDGE_REGIONS_MAX; i++)
        if (client->regions[i])
            munmap(client->regions[i], client->region_sizes[i]);
    free(client->buffer);
    free(client);
}

const char *edge_error(const edge_client *client) { return client->error; }
const char *edge_error_code(const edge_client *client) { return client->code; }
double edge_retry_after_s(const edge_client *client) { return client->retry_after_s; }

int edge_tensor_set(edge_tensor *tensor, const char *name, const char *datatype, int dimensions,
                    const int64_t *shape, const void *data, size_t size)
{
    memset(tensor, 0, sizeof *tensor);
    if (strlen(name) >= sizeof tensor->name || strlen(datatype) >= sizeof tensor->datatype ||
        dimensions < 0 || dimensions > EDGE_DIMENSIONS_MAX)
        return EDGE_INVALID;
    strcpy(tensor->name, name);
    strcpy(tensor->datatype, datatype);
    tensor->dimensions = dimensions;
    for (int i = 0; i < dimensions; i++)
        tensor->shape[i] = shape[i];
    tensor->data = data;
    tensor->size = size;
    tensor->region = -1;
    return EDGE_OK;
}

int edge_region(edge_client *client, const char *model, int region, size_t size, void **memory,
                double timeout_s)
{
    uint64_t deadline_ns = now_ns() + (uint64_t)(timeout_s * 1e9);
    static const char where[] = "shared memory";
    if (region < 0 || region >= EDGE_REGIONS_MAX || !size || client->regions[region])
        return fail(client, EDGE_INVALID, "region %d: no such number, used, or empty", region);
    text *header = calloc(1, sizeof *header);
    int fd = memfd_create("edge-region", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    void *mapped = MAP_FAILED;
    /* Sized, then sealed: the server refuses memory that could be taken from under it. */
    if (header && fd >= 0 && !ftruncate(fd, (off_t)size) &&
        !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int result = EDGE_OK;
    if (mapped == MAP_FAILED) {
        result = fail(client, EDGE_INVALID, "%s: %s", where, strerror(errno));
    } else {
        add(header, "{");
        add_name(header, "model_name", model);
        add(header, ",\"region\":%d,\"byte_size\":%zu}", region, size);
        pad(header);
        if (header->bad)
            result = fail(client, EDGE_INVALID, "the model's name cannot be sent");
    }
    if (!result)
        result = send_frame_start(client, KIND_REGION_ADD, header, 0, fd, deadline_ns);
    if (!result)
        result = receive_answer(client, KIND_REGION_ADD, client->next_id, deadline_ns);
    if (fd >= 0)
        close(fd); /* the mappings keep the memory */
    free(header);
    if (result) {
        if (mapped != MAP_FAILED)
            munmap(mapped, size);
        return result;
    }
    client->regions[region] = *memory = mapped;
    client->region_sizes[region] = size;
    return EDGE_OK;
}

int edge_routing_key(edge_client *client, const char *key)
{
    size_t size = strlen(key);
    if (size >= sizeof client->routing_key)
        return fail(client, EDGE_INVALID, "the routing key has %zu characters", size);
    memcpy(client->routing_key, key, size + 1);
    return EDGE_OK;
}

static void write_request(text *to, const char *model, const char *routing_key,
                          const edge_tensor *inputs, int inputs_count,
                          const edge_tensor *wanted, int wanted_count)
{
    add(to, "{");
    add_name(to, "model_name", model);
    if (*routing_key) {
        add(to, ",\"parameters\":{");
        add_name(to, "routing_key", routing_key);
        add(to, "}");
    }
    add(to, ",\"inputs\":[");
    for (int i = 0; i < inputs_count; i++) {
        const edge_tensor *tensor = &inputs[i];
        add(to, i ? ",{" : "{");
        add_name(to, "name", tensor->name);
        add(to, ",");
        add_name(to, "datatype", tensor->datatype);
        add(to, ",\"shape\":[");
        for (int j = 0; j < tensor->dimensions; j++)
            add(to, j ? ",%lld" : "%lld", (long long)tensor->shape[j]);
        add(to, "],");
        if (tensor->region >= 0)
            add_place(to, tensor);
        else
            add(to, "\"parameters\":{\"binary_data_size\":%zu}", tensor->size);
        add(to, "}");
    }
    add(to, "],\"outputs\":[");
    for (int i = 0; i < wanted_count; i++) {
        add(to, i ? ",{" : "{");
        add_name(to, "name", wanted[i].name);
        if (wanted[i].region >= 0) {
            add(to, ",");
            add_place(to, &wanted[i]);
        }
        add(to, "}");
    }
    add(to, "]}");
    pad(to);
}

/* One output of an answer; *offset is where the next one begins in the body. */
static int read_output(const edge_client *client, const char *at, edge_tensor *output,
                       size_t *offset)
{
    uint64_t value, size;
    memset(output, 0, sizeof *output);
    output->region = -1;
    if (!string(member(at, "name"), output->name, sizeof output->name) ||
        !string(member(at, "datatype"), output->datatype, sizeof output->datatype))
        return 0;
    const char *shape = member(at, "shape");
    for (const char *dim = first(shape); dim; dim = next(dim)) {
        if (output->dimensions == EDGE_DIMENSIONS_MAX || !number(dim, &value))
            return 0;
        output->shape[output->dimensions++] = (int64_t)value;
    }
    const char *parameters = member(at, "parameters");
    if (number(member(parameters, "shared_memory_region"), &value)) {
        uint64_t start = 0;
        number(member(parameters, "shared_memory_offset"), &start); /* 0 may be left out */
        if (value >= EDGE_REGIONS_MAX || !client->regions[value] ||
            !number(member(parameters, "shared_memory_byte_size"), &size) ||
            start > client->region_sizes[value] || size > client->region_sizes[value] - start)
            return 0;
        output->region = (int)value;
        output->offset = (size_t)start;
        output->data = (const char *)client->regions[value] + start;
    } else {
        if (!number(member(parameters, "binary_data_size"), &size) ||
            size > client->body_size - *offset)
            return 0;
        output->data = client->buffer + client->header_size + 1 + *offset;
        *offset += (size_t)size;
    }
    output->size = (size_t)size;
    return 1;
}

int edge_infer(edge_client *client, const char *model, const edge_tensor *inputs, int inputs_count,
               const edge_tensor *wanted, int wanted_count, edge_tensor *outputs,
               int *outputs_count, double timeout_s)
{
    uint64_t deadline_ns = now_ns() + (uint64_t)(timeout_s * 1e9);
    size_t body_size = 0;
    for (int i = 0; i < inputs_count; i++)
        body_size += inputs[i].region >= 0 ? 0 : inputs[i].size;
    text *header = calloc(1, sizeof *header);
    if (!header || body_size > UINT32_MAX) {
        free(header);
        return fail(client, EDGE_INVALID, "too large to send");
    }
    write_request(header, model, client->routing_key, inputs, inputs_count, wanted, wanted_count);
    int result = header->bad ? fail(client, EDGE_INVALID, "names cannot be sent, or too many")
                             : send_frame_start(client, KIND_INFER, header, body_size, -1,
                                                deadline_ns);
    free(header);
    for (int i = 0; i < inputs_count && !result; i++)
        if (inputs[i].region < 0)
            result = send_all(client, inputs[i].data, inputs[i].size, -1, deadline_ns);
    if (!result)
        result = receive_answer(client, KIND_INFER, client->next_id, deadline_ns);
    if (result)
        return result;
    int room = *outputs_count;
    size_t offset = 0;
    *outputs_count = 0;
    if (!skip(client->buffer, 0))
        return fail(client, EDGE_MALFORMED, "the server's answer is not JSON");
    for (const char *at = first(member(client->buffer, "outputs")); at; at = next(at)) {
        if (*outputs_count == room)
            return fail(client, EDGE_INVALID, "more than %d outputs", room);
        if (!read_output(client, at, &outputs[*outputs_count], &offset))
            return fail(client, EDGE_MALFORMED, "the server's answer has a wrong output");
        ++*outputs_count;
    }
    return EDGE_OK;
}
